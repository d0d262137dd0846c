"Make README.md from nbs/index.ipynb as it is saved: markdown, code, and text, tables and pictures of its outputs"
import base64, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
directive = re.compile(r'^#\| *([\w-]+):? *(.*?)\n?$')


def split_directives(source):
    "The `#|` lines of a cell as a dict, and the rest of its source"
    lines = ''.join(source).splitlines(keepends=True)
    found = dict(m.groups() for m in map(directive.match, lines) if m)
    return found,''.join(o for o in lines if not directive.match(o)).strip()


def show_output(out, alt, pictures):
    "One output as markdown; a picture goes into `pictures`"
    data = out.get('data', {})
    if 'image/png' in data:
        pictures.append(base64.b64decode(data['image/png']))
        return f'![{alt}](nbs/images/index-{len(pictures)}.png)'
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(out.get('text', data.get('text/plain', ''))).rstrip()
    return f'```\n{text}\n```' if text else ''


def convert(nb):
    "The markdown of notebook `nb`, and its pictures"
    parts,pictures = [],[]
    for cell in nb['cells']:
        found,source = split_directives(cell['source']) if cell['cell_type'] == 'code' else ({}, ''.join(cell['source']))
        if 'hide' in found: continue
        if cell['cell_type'] == 'markdown': parts.append(source)
        elif cell['cell_type'] == 'code':
            if found.get('echo') != 'false' and source: parts.append(f'```python\n{source}\n```')
            parts += [show_output(o, found.get('fig-alt', ''), pictures) for o in cell['outputs']]
    text = '\n\n'.join(o.strip() for o in parts if o.strip())
    text = re.sub(r'\]\((?=[\w/]+\.ipynb\))', '](nbs/', text)
    text = re.sub(r'\]\((\w+)\.qmd\)', lambda m: f']({m[1].upper()}.md)', text) # pages that only include a file of the root
    return f'<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n{text}\n',pictures


def files(index=root/'nbs'/'index.ipynb'):
    "What the README consists of: path from the root, bytes"
    text,pictures = convert(json.loads(index.read_text(encoding='utf-8')))
    return {'README.md': text.encode(), **{f'nbs/images/index-{i}.png': o for i,o in enumerate(pictures, 1)}}


if __name__ == '__main__':
    for name,data in files().items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
