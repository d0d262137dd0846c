"""Build the documentation in _docs: nbdev processes the notebooks, smalldocs renders them. No network, no Quarto.

(The command nbdev_proc_nbs tries to install Quarto where there is none; the function behind it does not.)"""
import base64, hashlib, html, re, shutil, subprocess
from pathlib import Path
from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
proc,docs = root/'_proc',root/'_docs'


def number_free(name):
    "The page name that nbdev's links have: `04_data` is the page `data`"
    return re.sub(r'^\d+_', '', name)


def mend_links(text, depth):
    "Links between pages relative, under the names that the pages have, and none to sources that are published nowhere"
    if not get_config().git_url: text = re.sub(r'\[source\]\([^)]*\)\{[^}]*\}', '', text)
    text = re.sub(r'\]\(((?:[\w.]+/)*)\d+_(?=\w+\.ipynb)', r'](\1', text)
    return re.sub(r'\]\(/(?=[\w/]+\.html)', '](' + '../'*depth, text)


def for_smalldocs(text):
    "The source of a page, or the configuration, without the two keys that are for Quarto only: smalldocs would warn of each"
    return re.sub(r'^    grid:\n( {6}.*\n)+|^ *"output-file: .*\n', '', text, flags=re.M)


def link_comments(page):
    "The HTML `page` with the links that nbdev makes of names in the comments of a signature as links"
    link = lambda comment: re.sub(r'\[`([^`]+)`\]\(([^)]+)\)', r'<a href="\2">\1</a>', comment[0])
    return re.sub(r'<span class="co">[^<]*</span>', link, page)


def fold_signatures(page):
    "The HTML `page` with each line of a signature in an element, so that a long comment can wrap under its own line"
    lines = lambda m: m[1] + ''.join(f'<span class="line">{o}</span>' for o in m[2].splitlines(keepends=True)) + m[3]
    return re.sub(r'(cell-output-markdown">\s*<hr />.*?<code class="sourceCode python">)(.*?)(</code></pre>)', lines, page, flags=re.S)


def secure(page):
    "The HTML `page` with a content security policy: what is not of this site, or not in the page as it was built, does not run or load"
    inline = re.findall(r'<script>(.*?)</script>', page, flags=re.S) + [html.unescape(o) for o in re.findall(r'\son\w+="([^"]*)"', page)]
    hashes = sorted({f"'sha256-{base64.b64encode(hashlib.sha256(o.encode()).digest()).decode()}'" for o in inline})
    policy = ("default-src 'self'; connect-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
              f"script-src 'self' 'unsafe-hashes' {' '.join(hashes)}; object-src 'none'; base-uri 'none'; form-action 'none'")
    return page.replace('<head>', f'<head><meta http-equiv="Content-Security-Policy" content="{policy}">', 1)


def main():
    for o in (proc, docs): shutil.rmtree(o, ignore_errors=True)
    proc_nbs()
    for f in sorted(proc.rglob('*.ipynb')):
        text = for_smalldocs(mend_links(f.read_text(encoding='utf-8'), len(f.relative_to(proc).parts) - 1))
        f.unlink()
        f.with_name(number_free(f.name)).write_text(text, encoding='utf-8')
    quarto = proc/'_quarto.yml'
    text = for_smalldocs(quarto.read_text(encoding='utf-8'))
    quarto.write_text(re.sub(r'(?<=- )[\w/]+\.ipynb', lambda m: number_free(m[0]), text), encoding='utf-8')
    subprocess.run(['smalldocs', 'render', '--quiet', proc], check=True)
    (proc/'_docs').rename(docs)
    for f in docs.rglob('*.css'): # the themes ask another host for fonts
        f.write_text(re.sub(r'@import\s+(url\(\s*)?["\']?https?:[^"\')]*["\']?\s*\)?[^;]*;', '', f.read_text(encoding='utf-8')), encoding='utf-8')
    pages = list(docs.rglob('*.html'))
    for f in pages: f.write_text(secure(fold_signatures(link_comments(f.read_text(encoding='utf-8')))), encoding='utf-8')
    print(f'{len(pages)} pages are in {docs}')


if __name__ == '__main__': main()
