"Reading digits from files, and exporting the network"
import json, subprocess, sys, time
from pathlib import Path
import numpy as np, onnx, onnxruntime, pytest, torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from mnist_block3.all import (Block3, block3_learner, find_images, load_block3, mnist_dls, mnist_form,
                              predict_digits, predict_files, weights_path)
from mnist_block3.cli import block3_export, block3_predict


def command(name, *args, **kwargs):
    command = [Path(sys.executable).parent/name, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture
def folder(tmp_path, mnist):
    "Five digits in files, beside a broken picture and a text"
    for i,image in enumerate(mnist[1].images[:5].numpy()):
        ImageOps.invert(Image.fromarray(image).resize((120,120), Image.BICUBIC)).save(tmp_path/f'{i}.png')
    (tmp_path/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n broken')
    (tmp_path/'notes.txt').write_text('no picture')
    return tmp_path


def test_finding_images(folder):
    names = ['0.png', '1.png', '2.png', '3.png', '4.png', 'broken.png']
    assert [file.name for file in find_images([folder])] == names
    found = find_images([folder/'[12].png', folder/'9*.png', folder/'0.png'])
    assert found == [folder/'1.png', folder/'2.png', folder/'9*.png', folder/'0.png']
    (folder/'[x].png').touch()
    assert find_images([folder/'[x].png']) == [folder/'[x].png']


def test_predict_files_over_several_batches(folder, mnist):
    found = list(predict_files(find_images([folder])*3, bs=4))
    assert [file.name for file,_ in found] == ['0.png', '1.png', '2.png', '3.png', '4.png', 'broken.png']*3
    digits = [int(result.argmax()) for _,result in found if not isinstance(result, ValueError)]
    assert digits == mnist[1].labels[:5].tolist()*3


def test_learner_predicts_from_files_and_pictures(folder):
    learn = block3_learner(mnist_dls(n_train=64, device='cpu'), pretrained=True)
    file = folder/'4.png'
    want = predict_digits(load_block3(), mnist_form(file)[None])[0]
    for item in (file, str(file), Image.open(file), mnist_form(file)):
        with learn.no_bar(): probs = learn.predict(item)[2]
        np.testing.assert_allclose(probs, want, atol=1e-5)
    assert want.argmax() == 4


def test_console(folder):
    done = command('block3_predict', '.', 'notes.txt', '4.png', 'gone.png', cwd=folder)
    rows = [line.split('\t') for line in done.stdout.splitlines()]
    names = ['0.png', '1.png', '2.png', '3.png', '4.png', '4.png']
    assert [row[:2] for row in rows] == [list(pair) for pair in zip(names, '721044')]
    assert all(0 < float(row[2]) <= 1 for row in rows)
    errors = done.stderr.splitlines()
    assert done.returncode == 1 and len(errors) == 3 and 'gone.png' in errors[2]
    assert all(error.startswith('block3_predict: ') for error in errors)


def test_console_as_json(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    block3_predict(['0.png'], json=True)
    row = json.loads(capsys.readouterr().out)
    assert row['digit'] == 7 and len(row['probabilities']) == 10 and row['path'] == '0.png'


def test_console_marks_what_it_does_not_know(tmp_path, mnist, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digit = mnist[1].images[0].numpy()
    Image.new('L', (90,90), 250).save('a_blank.png')
    Image.fromarray(digit).save('b_digit.png')
    Image.fromarray(np.concatenate([np.pad(digit, 20)]*2, axis=1)).save('c_two.png')
    names = ['a_blank.png', 'b_digit.png', 'c_two.png']
    done = command('block3_predict', *names, '--min-probability', '1.1')
    rows = [line.split('\t') for line in done.stdout.splitlines()]
    assert [row[-1] for row in rows] == ['none', 'unsure', 'several'] and rows[1][1] == '7'
    assert done.returncode == 3 and not done.stderr
    assert block3_predict([*names, 'gone.png'], json=True) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['mark'] for row in rows] == ['none', None, 'several']
    assert 'it is blank' in rows[0]['reason'] and '2 parts' in rows[2]['reason']


def test_weights(tmp_path):
    save_file({'a': torch.zeros(3)}, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='does not hold the weights'): load_block3(tmp_path/'other.safetensors')
    with pytest.raises(FileNotFoundError): load_block3(tmp_path)
    (tmp_path/'weights.safetensors').write_bytes(weights_path.read_bytes())
    want = Block3(pretrained=True).state_dict()
    torch.testing.assert_close(load_block3(tmp_path).state_dict(), want, rtol=0, atol=0)


def test_export(tmp_path, mnist):
    done = command('block3_export', '--formats', 'safetensors,onnx,js', '--out', 'here', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f'here/block3.{name}' for name in ('safetensors', 'onnx', 'js')]
    weights = load_file(tmp_path/'here'/'block3.safetensors')
    torch.testing.assert_close(weights, load_block3().state_dict(), rtol=0, atol=0)
    session = onnxruntime.InferenceSession(tmp_path/'here'/'block3.onnx')
    images = mnist[1].images[:300]
    logp = session.run(['log_probabilities'], {'images': ((images[:,None]/255 - 0.1307)/0.3081).numpy()})[0]
    np.testing.assert_allclose(np.exp(logp), predict_digits(load_block3(), images), atol=1e-5)
    assert onnx.load(tmp_path/'here'/'block3.onnx').opset_import[0].version == 18


def test_export_of_an_unknown_format():
    with pytest.raises(ValueError, match="formats='onxx': formats is one of 'safetensors', 'onnx', 'js'"):
        block3_export(formats='onxx')


@pytest.mark.slow
def test_ten_thousand_files_in_half_a_minute(tmp_path, mnist):
    images = mnist[1].images
    for i,image in enumerate(images.numpy()): Image.fromarray(image).save(tmp_path/f'{i:05}.png')
    began = time.perf_counter()
    done = command('block3_predict', tmp_path)
    assert time.perf_counter() - began < 30
    digits = np.array([int(line.split('\t')[1]) for line in done.stdout.splitlines()])
    assert (digits == predict_digits(load_block3(), images).argmax(1)).sum() >= 9_999
