"Make README.md from the saved nbs/index.ipynb: its Markdown and code, and what its cells put out"
import base64, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
directive = re.compile(r'^#\| *([\w-]+):? *(.*?)\n?$')


def split_directives(source):
    "The `#|` lines of a code cell as a dict, and the rest of its source"
    lines = ''.join(source).splitlines(keepends=True)
    directives = dict(m.groups() for m in map(directive.match, lines) if m)
    code = ''.join(line for line in lines if not directive.match(line))
    return directives, code.strip()


def show_output(out, alt, pictures):
    "One output as Markdown; a picture goes into `pictures`"
    data = out.get('data', {})
    if 'image/png' in data:
        pictures.append(base64.b64decode(data['image/png']))
        return f'![{alt}](nbs/images/index-{len(pictures)}.png)'
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(out.get('text', data.get('text/plain', ''))).rstrip()
    return f'```\n{text}\n```' if text else ''


def show_code_cell(cell, pictures):
    "The code of a cell and its outputs, as a list of Markdown parts"
    directives, code = split_directives(cell['source'])
    if 'hide' in directives: return []
    alt = directives.get('fig-alt', '')
    outputs = [show_output(out, alt, pictures) for out in cell['outputs']]
    hidden = not code or directives.get('echo') == 'false'
    return outputs if hidden else [f'```python\n{code}\n```', *outputs]


def link_from_root(text):
    "Make links relative to the root; a `.qmd` page that the index names includes a file of the root"
    text = re.sub(r'\]\((?=[\w/]+\.ipynb\))', '](nbs/', text)
    return re.sub(r'\]\((\w+)\.qmd\)', lambda m: f']({m[1].upper()}.md)', text)


def convert(nb):
    "The Markdown of notebook `nb`, and its pictures"
    parts = ['<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->']
    pictures = []
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': parts.append(''.join(cell['source']))
        elif cell['cell_type'] == 'code': parts += show_code_cell(cell, pictures)
    text = '\n\n'.join(part.strip() for part in parts if part.strip())
    return link_from_root(text) + '\n', pictures


def files(index=root/'nbs'/'index.ipynb'):
    "The files of the README: path from the root, bytes"
    text, pictures = convert(json.loads(index.read_text(encoding='utf-8')))
    images = {f'nbs/images/index-{i}.png': png for i, png in enumerate(pictures, 1)}
    return {'README.md': text.encode(), **images}


if __name__ == '__main__':
    for name, data in files().items():
        path = root/name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
