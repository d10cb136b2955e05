"""Names of thousands of digits, which zips and tables may have: no disk takes them, and no int."""

from runtime.commandline import BadInput

import io
import zipfile

import pytest
from data_files import noise
from PIL import Image

from image_data import datasets
from image_data.trees import _sorted_classes


def zipped(path, names, labels=""):
    whole = io.BytesIO()
    Image.fromarray(noise((8, 8))).save(whole, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, whole.getvalue())
        if labels:
            archive.writestr("dataset.json", labels)
    return path


def test_classes_of_any_number_of_digits(tmp_path, capsys):
    """5,000 digits are more than Python makes a number of."""
    long = "1" * 5000
    path = zipped(tmp_path / "a.zip", [f"{long}/a.png", "2/a.png", "10/a.png", "03/a.png"])
    found = datasets.load(str(path), tmp_path / "d", workers=1)
    assert found.class_names == ("2", "03", "10", long)
    assert len(max(capsys.readouterr().out.splitlines(), key=len)) < 1000


def test_classes_are_in_the_order_of_their_numbers():
    names = ("0", "00", "1", "01", "007", "12", "0110", "٣")
    assert _sorted_classes(names) == tuple(sorted(names, key=lambda name: (int(name), name)))
    assert _sorted_classes(("b", "10", "2")) == ("10", "2", "b")


@pytest.mark.parametrize("label", ["1" * 4200, str(2**31), "-1", "1.5", "true"])
def test_labels_that_no_class_has(tmp_path, label):
    names = [f"00000/img0000000{i}.png" for i in range(2)]
    labels = f'{{"labels": [["{names[0]}", {label}], ["{names[1]}", 2]]}}'
    path = zipped(tmp_path / "a.zip", names, labels)
    with pytest.raises(BadInput, match="expected a whole number from 0 to 2147483647") as raised:
        datasets.load(str(path), tmp_path / "d", workers=1)
    assert len(str(raised.value)) < 400
