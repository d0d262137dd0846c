"""Run the tests, each time in another order, until they have passed N times in a row, and keep what came of each time.

Stopped at any moment, it goes on. What counts are runs of the same files: a change of any of them but the record begins anew."""
import csv, hashlib, random, subprocess, sys, tempfile, time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree
import torch
from mnist_block3.run import run_environment

root = Path(__file__).resolve().parent.parent
record = 'nbs/results/random_order.csv'


def git(*args, cwd): return subprocess.run(['git', *args], cwd=cwd, check=True, capture_output=True, text=True).stdout

def code_name(root):
    "Eight digits for the files under version control, without the record; raises `ValueError` where they are not those of a commit"
    others = '.', f':!{record}'
    if changed := git('status', '--porcelain', '--untracked-files=no', '--', *others, cwd=root): raise ValueError(f'commit first, since a result is of a commit:\n{changed}')
    return hashlib.sha1(git('ls-files', '-s', '--', *others, cwd=root).encode()).hexdigest()[:8]


def rows(root):
    "The runs so far"
    path = root/record
    return list(csv.DictReader(path.open(newline=''))) if path.exists() else []

def in_a_row(rows, code):
    "How many of the last runs of `code` have passed"
    results = [o['failed'] == '0' for o in rows if o['code'] == code][::-1]
    return (results + [False]).index(False)


def run_once(root, seed):
    "The tests in the order of `seed`; a row of the record. `SystemExit` where they came to no end"
    with tempfile.TemporaryDirectory() as d:
        args = '-n', 'auto', '--random-order', f'--random-order-seed={seed}'
        print(f'== pytest {" ".join(args)}', flush=True)
        date,began = datetime.now(timezone.utc),time.perf_counter()
        code = subprocess.run([sys.executable, '-m', 'pytest', *args, f'--junit-xml={d}/report.xml'], cwd=root).returncode
        if code not in (0, 1): sys.exit(code)
        suite = next(ElementTree.parse(f'{d}/report.xml').iter('testsuite')).attrib
    failed = int(suite['failures']) + int(suite['errors'])
    if (code == 0) != (failed == 0): sys.exit(f'pytest ended with {code}, and its report has {failed} failures')
    ran_on = run_environment(torch.device('cpu'))
    libs = {o: ran_on['versions'][o] for o in ('python','torch','torchvision','fastai','fastcore')} | {o: version(o) for o in ('nbdev','pytest-random-order')}
    return dict(code=code_name(root), date=f'{date:%Y-%m-%dT%H:%M:%SZ}', command=f'pytest {" ".join(args)}', tests=suite['tests'], failed=failed, skipped=suite['skipped'],
                seconds=round(time.perf_counter() - began), **libs, processor=ran_on['machine']['device_name'], cores=ran_on['machine']['cores'])


def main(n=10, root=root):
    "Run and record until the last `n` runs of what is there have passed; `SystemExit` at the first that has not"
    code = code_name(root)
    while (done := in_a_row(rows(root), code)) < n:
        print(f'{done} of {n} times in a row', flush=True)
        row,path = run_once(root, random.SystemRandom().randrange(10**6)),root/record
        if row['code'] != code: sys.exit('the files have changed meanwhile')
        new = not path.exists()
        with path.open('a', newline='') as f:
            out = csv.DictWriter(f, row, lineterminator='\n')
            if new: out.writeheader()
            out.writerow(row)
        if row['failed']: sys.exit(1)
    print(f'The tests have passed {done} times in a row, each time in another order: {record}')


if __name__ == '__main__':
    try: main(*map(int, sys.argv[1:]))
    except ValueError as e: sys.exit(f'shuffled: {e}')
