"""Build the documentation in _docs: nbdev processes the notebooks, smalldocs renders them, without a network.

(The command nbdev_proc_nbs tries to install Quarto; this script calls the function behind that command.)"""
import base64, hashlib, html, re, shutil, subprocess
from pathlib import Path
from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
proc = root/'_proc'
docs = root/'_docs'


def edit(path, change):
    "Replace the text of the file at `path` by what the function `change` makes of that text"
    path.write_text(change(path.read_text(encoding='utf-8')), encoding='utf-8')


# Before rendering: notebooks and configuration, as smalldocs reads them

def drop_number(name):
    "`00_data.ipynb` becomes `data.ipynb`: nbdev's own links use that name for the page"
    return re.sub(r'^\d+_', '', name)


def mend_links(text, depth):
    "Make links relative to a page `depth` folders down; drop those to private names and to unpublished source code"
    text = re.sub(r'\[(`_\w+`)\]\([^)]*\)', r'\1', text)
    if not get_config().git_url: text = re.sub(r'\[source\]\([^)]*\)\{[^}]*\}', '', text)
    text = re.sub(r'\]\(((?:[\w.]+/)*)\d+_(?=\w+\.ipynb)', r'](\1', text)
    return re.sub(r'\]\(/(?=[\w/]+\.html)', '](' + '../'*depth, text)


def drop_quarto_keys(text):
    "Without the two keys that only Quarto knows: smalldocs would warn about each of them"
    return re.sub(r'^    grid:\n( {6}.*\n)+|^ *"output-file: .*\n', '', text, flags=re.M)


def prepare_notebook(path):
    depth = len(path.relative_to(proc).parts) - 1
    edit(path, lambda text: drop_quarto_keys(mend_links(text, depth)))
    path.rename(path.with_name(drop_number(path.name)))


def prepare_config(text):
    return re.sub(r'(?<=- )[\w/]+\.ipynb', lambda m: drop_number(m[0]), drop_quarto_keys(text))


# After rendering: the pages and styles of the site

def link_comments(page):
    "Turn the Markdown links that nbdev puts into the comments of a signature into HTML links"
    def link(comment): return re.sub(r'\[`([^`]+)`\]\(([^)]+)\)', r'<a href="\2">\1</a>', comment[0])
    return re.sub(r'<span class="co">[^<]*</span>', link, page)


def fold_signatures(page):
    "Put each line of a signature in an element of its own, so that a long comment wraps under its own line"
    def fold(m):
        start, code, end = m.groups()
        lines = (f'<span class="line">{line}</span>' for line in code.splitlines(keepends=True))
        return start + ''.join(lines) + end
    signature = r'(cell-output-markdown">\s*<hr />.*?<code class="sourceCode python">)(.*?)(</code></pre>)'
    return re.sub(signature, fold, page, flags=re.S)


def sha256_source(script):
    "How a content security policy names one inline script"
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def secure(page):
    "Add a content security policy: only this site's files and the scripts now in `page` may load or run"
    scripts = re.findall(r'<script>(.*?)</script>', page, flags=re.S)
    handlers = [html.unescape(code) for code in re.findall(r'\son\w+="([^"]*)"', page)]
    hashes = ' '.join(sorted({sha256_source(code) for code in scripts + handlers}))
    policy = ("default-src 'self'; connect-src 'self'; img-src 'self' data:; "
              f"style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-hashes' {hashes}; "
              "object-src 'none'; base-uri 'none'; form-action 'none'")
    return page.replace('<head>', f'<head><meta http-equiv="Content-Security-Policy" content="{policy}">', 1)


def drop_web_fonts(css):
    "The themes import fonts from another host"
    return re.sub(r'@import\s+(url\(\s*)?["\']?https?:[^"\')]*["\']?\s*\)?[^;]*;', '', css)


def main():
    for folder in (proc, docs): shutil.rmtree(folder, ignore_errors=True)
    proc_nbs()
    for path in sorted(proc.rglob('*.ipynb')): prepare_notebook(path)
    edit(proc/'_quarto.yml', prepare_config)
    subprocess.run(['smalldocs', 'render', '--quiet', proc], check=True)
    (proc/'_docs').rename(docs)
    for path in docs.rglob('*.css'): edit(path, drop_web_fonts)
    pages = list(docs.rglob('*.html'))
    for path in pages: edit(path, lambda page: secure(fold_signatures(link_comments(page))))
    print(f'{len(pages)} pages are in {docs}')


if __name__ == '__main__': main()
