"""Weights are mapped part by part: a part that is no longer used is no memory of the process."""

from runtime.commandline import BadInput

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from networks.published import files

MB = 2**20


def mapped(path):
    """Bytes of a file that are mapped by this process, from the kernel's list of maps."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = line.split()[0].split("-")
            found += int(end, 16) - int(start, 16)
    return found


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("part", [1, 100, 2**25])
def test_tensors_come_as_they_were_saved(tmp_path, monkeypatch, part):
    monkeypatch.setattr(files, "PART", part)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    state = {str(dtype): normal(3, 5).to(dtype) for dtype in dtypes}
    state |= {"flags": torch.tensor([True, False, True]), "ids": torch.arange(77)}
    state |= {"number": torch.tensor(3.5), "empty": torch.zeros(0, 4), "last": normal(4, 2, 3, 3)}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = files.read_weights(tmp_path / "x.safetensors")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tolist() == value.tolist()


def test_tensors_that_begin_anywhere_are_read(tmp_path):
    """safetensors' own writer aligns them; a file of others need not."""
    flag, numbers = torch.tensor([1, 2, 3], dtype=torch.uint8), normal(4)
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [3, 19]},
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text
    path = tmp_path / "x.safetensors"
    path.write_bytes(content + flag.numpy().tobytes() + numbers.numpy().tobytes())
    found = files.read_weights(path)
    assert torch.equal(found["a"], flag) and torch.equal(found["b"], numbers.view(2, 2))


def test_what_is_dropped_is_mapped_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART", MB)
    path = tmp_path / "x.safetensors"
    save_file({f"{i}": normal(MB // 4) for i in range(8)}, path)
    state = files.read_weights(path)
    assert mapped(path) >= 8 * MB
    for i in range(7):
        state.pop(f"{i}")
    assert MB <= mapped(path) <= 2 * MB
    state.clear()
    assert mapped(path) == 0


def test_the_file_is_never_written(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": normal(10)}, path)
    before = path.read_bytes()
    files.read_weights(path)["x"].zero_()
    assert path.read_bytes() == before


def test_a_torn_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": normal(1000)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="torn"):
        files.read_weights(path)
