"""CIFAR's pickles that lie: nothing is called, no memory but the file's own is read."""

from runtime.commandline import BadInput

import io
import pickle
import tracemalloc

import numpy as np
import pytest
from data_files import noise, python2_pickle

from image_data.cifar_pickle import read_batch

ROWS, LABELS = noise((3, 3072)), [1, 2, 9]
ARRAYS = {"list": list, "int64": np.array, "uint8": lambda v: np.array(v, np.uint8)}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("labels", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("key", [str, str.encode], ids=["text", "bytes"])
def test_what_python_3_wrote_is_read(protocol, labels, key):
    written = {key("data"): ROWS, key("labels"): labels(LABELS), key("names"): ["a.png"] * 3}
    for rows in (ROWS, np.asfortranarray(ROWS)):
        data, told = read_batch(pickle.dumps(written | {key("data"): rows}, protocol))
        assert data.dtype == np.uint8 and (data == ROWS).all() and list(told) == LABELS


def test_what_python_2_wrote_is_read():
    data, labels = read_batch(python2_pickle(ROWS, LABELS))
    assert (data == ROWS).all() and list(labels) == LABELS


def batch(dtype=b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR", state=b"(K\x03U\x01|NNNJ%bJ%bK\x00tb", **n):
    """A batch by hand, with another type, another state of it, a shape or a length of content."""
    minus = b"\xff\xff\xff\xff"
    shape = n.get("shape", b"K\x01K\x02\x86")
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    array += b"(K\x01" + shape + dtype + state.replace(b"%b", minus) + b"\x89U\x02ab"
    return b"\x80\x02}(U\x04data" + array + b"tbU\x06labels](K\x00eu."


def test_the_batch_by_hand_is_one():
    data, labels = read_batch(batch())
    assert data.tolist() == [[97, 98]] and labels.tolist() == [0]


def again_and_again(n):
    """A call that makes bytes of one text, n times."""
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000
    raw = b"\x80\x02(c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    return raw + b"h\x00h\x01h\x02\x86R" * n + b"l."


# Tuples of one tuple twice, 40 deep: 2^40 brackets, if somebody writes them down.
NESTED = b"\x80\x02%b)" + b"q\x00h\x00\x86" * 40 + b"K\x00K\x01\x87R."

HOSTILE = {
    # An object array with flags 0 took the file's bytes as addresses of objects.
    "objects": (batch(b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR"), "type 'O8'"),
    "objects by their state": (batch(state=b"(K\x03U\x01|NNNJ%bJ%bK?tb"), "gives a Dtype a state"),
    "fields": (batch(state=b"(K\x03U\x01|N]}J%bJ%bK\x00tb"), "gives a Dtype a state"),
    "larger items": (batch(state=b"(K\x03U\x01|NNNK\x40J%bK\x00tb"), "gives a Dtype a state"),
    "wide numbers": (batch(b"cnumpy\ndtype\n(U\x02u8K\x00K\x01tR"), "2 bytes for an array"),
    "text": (batch(b"cnumpy\ndtype\n(U\x03U99K\x00K\x01tR"), "type 'U99'"),
    "beyond": (batch(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), "2 bytes for an array"),
    "negative": (batch(shape=b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"), "shape or content"),
    "many axes": (batch(shape=b"(" + b"K\x01" * 60 + b"t"), "shape or content"),
    "other calls": (pickle.dumps({"data": np.dtype, "labels": print}), "holds 'builtins.print'"),
    "a slice": (pickle.dumps({"data": slice(1), "labels": []}), "holds 'builtins.slice'"),
    "no array": (pickle.dumps({"data": [1], "labels": [1]}), 'no array "data"'),
    "labels that are no numbers": (
        pickle.dumps({"data": ROWS, "labels": ["1", True, 2.0]}),
        'no whole numbers as "labels"',
    ),
    "no dictionary": (pickle.dumps([1]), "torn"),
    "a text again and again": (again_and_again(30), "gives 1,500,090 bytes to calls"),
    "a type of nested tuples": (NESTED % b"cnumpy\ndtype\n", "numbers of the type a tuple"),
    "a call of nested tuples": (NESTED % b"c_codecs\nencode\n", "in another way than CIFAR"),
    "a long number": (b"\x80\x02I" + b"z" * 10_000 + b"\n.", "^torn: ValueError.{0,150}$"),
    "a length beyond the file": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "torn"),
}


@pytest.mark.parametrize("raw, message", HOSTILE.values(), ids=HOSTILE)
def test_batches_that_lie_are_refused(raw, message):
    with pytest.raises(BadInput, match=message):
        read_batch(raw)


def test_no_mutation_crashes_or_takes_much_memory():
    """Bytes changed, cut and put in at random: an array or one line."""
    rng, whole, read = np.random.default_rng(0), python2_pickle(ROWS[:1], [3]), 0
    head = [i for i in range(len(whole)) if i < 150 or i > len(whole) - 30]  # pixels are pixels
    tracemalloc.start()
    for _ in range(3000):
        raw = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.choice(head))
            raw[place : place + rng.integers(0, 2)] = rng.bytes(rng.integers(0, 3))
        try:
            data, _ = read_batch(bytes(raw))
            read += data.nbytes <= len(raw)
        except BadInput as error:
            assert "\n" not in str(error)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < read < 3000 and used < 3e6


def test_many_instructions_are_refused():
    with pytest.raises(BadInput, match="more than 500000 instructions"):
        read_batch(io.BytesIO(b"\x80\x02" + b"N" * 600_000).getvalue())
