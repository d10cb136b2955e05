"""Names of splits that stand in words, one level down, or beside what is no split of theirs."""

from runtime.commandline import BadInput

import zipfile

import pytest

from image_data.trees import tree_source

READ = {  # file names without endings; classes with numbers of images, train | test
    "trainset/cat/1 testset/cat/2 trainset/dog/3": "cat 1, dog 1 | cat 1",
    "train_images/cat/1 test_images/cat/2 train_images/dog/3": "cat 1, dog 1 | cat 1",
    "TrainData/cat/1 TestData/cat/2 TrainData/dog/3": "cat 1, dog 1 | cat 1",
    "trainImages/1 trainImages/2 valImages/3": "2 images | 1 image",
    "trainset/1 trainset/2 test/3": "2 images | 1 image",
    "train/1 train/2 test_images/3": "2 images | 1 image",
    "train2017/1 train2017/2 val2017/3": "2 images | 1 image",
    "coco/images/train2017/1 coco/images/train2017/2 coco/images/val2017/3": "2 images | 1 image",
    "trainA/1 trainA/2 testA/3": "2 images | 1 image",
    "car/1 bus/2 train/3": "bus 1, car 1, train 1",
    "trainer/1 tester/2": "tester 1, trainer 1",
    "photos/cat/1 photos/dog/2 docs/": "cat 1, dog 1",
    "cat/1 dog/": "cat 1",
    "cat/1 cat/2 dog/ emu/": "cat 2",
    "all/cat/1 all/dog/": "cat 1",
    "images/1 labels/": "1 image",
    "images/1 other/": "1 image",
    "photos/1": "1 image",
}
REFUSED = {
    "dataset/training_set/cats/1 dataset/training_set/dogs/2 dataset/test_set/cats/3 "
    "single_prediction/4": "splits inside of dataset/, expected .* or is dataset/ the data set",
    "a/train2017/1 a/val2017/2 b/3": "splits inside of a/",
    "trainA/1 testA/2 trainB/3 testB/4": "trainA/ and trainB/ both name the train|"
    "testA/ and testB/ both name the test",
    "train/1 unlabeled/2": "has unlabeled/ beside train/, which by name is a split: move",
    "train/1 extra/2": "has extra/ beside train/",
    "train/1 extra/2 unlabeled/3": "has extra/, unlabeled/ beside train/",
    "test/1 control/2": "has control/ beside test/",
    "train/1 a/x/2 b/y/3": "has a/, b/ beside train/",
}


def made(tmp_path, text):
    """The folder and the zip of these names."""
    folder = tmp_path / "set"
    for name in text.split():
        path = folder / (name if name[-1] == "/" else f"{name}.png")
        (path if name[-1] == "/" else path.parent).mkdir(parents=True, exist_ok=True)
        if name[-1] != "/":
            path.write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in text.split():
            archive.writestr(name if name[-1] == "/" else f"{name}.png", b"")
    return folder, tmp_path / "set.zip"


def understood(contents):
    if not contents.class_names:
        return f"{len(contents.items)} image" + "s" * (len(contents.items) > 1)
    counts = [(name, (contents.labels == i).sum()) for i, name in enumerate(contents.class_names)]
    return ", ".join(f"{name} {count}" for name, count in counts if count)


@pytest.mark.parametrize("text", READ)
def test_what_is_understood(tmp_path, text):
    for path in made(tmp_path, text):
        found = [tree_source(path, split).contents() for split in ("train", "test")]
        expected = READ[text].split(" | ")
        assert [understood(contents) for contents in found] == (expected * 2)[:2]
        if "dog/ " in f"{text} " and "/1" in text:
            assert "without images: " in found[0].told and "dog/" in found[0].told


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(tmp_path, text):
    for path in made(tmp_path, text):
        with pytest.raises(BadInput, match=REFUSED[text]) as told:
            tree_source(path, "train").contents()
        assert "\n" not in str(told.value)


def test_one_of_two_domains_is_typed(tmp_path):
    folder, packed = made(tmp_path, "trainA/1 valA/2 trainB/3 valB/4")
    with pytest.raises(BadInput, match=f"join them, or type --data {folder}/trainA$"):
        tree_source(folder, "train").contents()
    assert len(tree_source(folder / "trainA", "train").contents().items) == 1
    with pytest.raises(BadInput, match="join them$"):
        tree_source(packed, "train").contents()
