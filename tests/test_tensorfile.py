"""The safetensors container: hostile headers one by one, and the format's own library as the judge."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hra_export.errors import FormatError
from hra_export.tensorfile import (
    DTYPES,
    MAX_HEADER_BYTES,
    TensorInfo,
    dtype_name,
    lay_out,
    read_header,
    strict_json,
    tensor_bytes,
)

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=60)
# Far more than a linear pass takes on a loaded machine (0.2 s), far less than a quadratic one (hours).
HANG_SECONDS = 20.0
# What torch can hold and safetensors writes, one byte and more an element.
TORCH_DTYPES = [getattr(torch, name) for _, name in DTYPES.values()]

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BODY = bytes(range(8))


def container(header: object, body: bytes = BODY, *, length: int | None = None) -> bytes:
    """A file of this header, given as an object or as raw text, and of this body."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def one(name: str = "a", **changes: object) -> dict[str, object]:
    """A header of one good tensor, with fields changed."""
    return {name: {**ENTRY, **changes}}


def two(first: list[int], second: list[int]) -> dict[str, object]:
    """Two byte tensors at these offsets."""
    places = {"a": first, "b": second}
    return {name: {"dtype": "U8", "shape": [at[1] - at[0]], "data_offsets": at} for name, at in places.items()}


GOOD = container({"__metadata__": {"format": "pt"}, **one()})
# The file's content, and a word of the message that says what is wrong with it.
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven-bytes": (b"\x02" + b"\0" * 6, "truncated"),
    "length-only": ((2).to_bytes(8, "little"), "truncated"),
    "length-one-too-many": (container(b"{}", b"", length=3), "truncated"),
    "length-of-100-mb-and-one": (container(b"{}", b"", length=MAX_HEADER_BYTES + 1), "header of 100000001"),
    "length-of-100-mb": (container(b"{}", b"", length=MAX_HEADER_BYTES), "truncated"),
    "length-negative": (b"\xff" * 8 + b"{}", "header of 18446744073709551615"),
    "length-sign-bit": ((1 << 63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808"),
    "length-big-endian": ((2).to_bytes(8, "big") + b"{}", "header of"),
    "length-zero": (container(b"", b""), "JSON"),
    "a-pickle": (b"\x80\x04\x95" + b"\x28" * 40, "header of"),
    "a-zip": (b"PK\x03\x04" + b"\0" * 40, "truncated"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "header of"),
    "header-not-utf8": (container(b'{"\xff":1}', b""), "not valid JSON"),
    "header-utf16": (container("{}".encode("utf-16"), b""), "not valid JSON"),
    "header-byte-order-mark": (container("\ufeff{}".encode(), b""), "not valid JSON"),
    "header-not-json": (container(b"{'a': 1}", b""), "not valid JSON"),
    "header-cut": (container(b'{"a":', b""), "not valid JSON"),
    "header-twice": (container(b"{}{}", b""), "not valid JSON"),
    "header-nul": (container(b"{}\0", b""), "not valid JSON"),
    "header-control-character": (container(b'{"a\n":1}', b""), "not valid JSON"),
    "header-half-surrogate": (container(json.dumps(one()).replace('"a"', '"\\ud800"').encode()), "not valid JSON"),
    "header-list": (container(b"[]", b""), "expected a JSON object"),
    "header-string": (container(b'"a"', b""), "expected a JSON object"),
    "header-number": (container(b"1", b""), "expected a JSON object"),
    "header-null": (container(b"null", b""), "expected a JSON object"),
    "header-nan": (container(b'{"a":NaN}', b""), "NaN"),
    "header-infinity": (container(b'{"a":-Infinity}', b""), "Infinity"),
    "header-deep-lists": (container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "not valid JSON"),
    "header-deep-objects": (container(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "not valid JSON"),
    "header-long-number": (container(b'{"a":' + b"9" * 5000 + b"}", b""), "not valid JSON"),
    "duplicate-tensor": (container(json.dumps(one()).encode()[:-1] + b"," + json.dumps(one()).encode()[1:]), "repeats"),
    "duplicate-escaped": (
        container(json.dumps(one()).encode()[:-1] + b"," + json.dumps(one()).replace('"a"', '"\\u0061"').encode()[1:]),
        "repeats",
    ),
    "duplicate-field": (container(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'), "`shape`"),
    "duplicate-metadata": (container(b'{"__metadata__":{},"__metadata__":{}}', b""), "__metadata__"),
    "metadata-list": (container({"__metadata__": [], **one()}), "strings to strings"),
    "metadata-null": (container({"__metadata__": None, **one()}), "strings to strings"),
    "metadata-string": (container({"__metadata__": "pt", **one()}), "strings to strings"),
    "metadata-of-numbers": (container({"__metadata__": {"a": 1}, **one()}), "strings to strings"),
    "metadata-of-null": (container({"__metadata__": {"a": None}, **one()}), "strings to strings"),
    "metadata-nested": (container({"__metadata__": {"a": {"b": "c"}}, **one()}), "strings to strings"),
    "entry-null": (container({"a": None}, b""), "`a`"),
    "entry-list": (container({"a": [0, 8]}), "`a`"),
    "entry-without-dtype": (container({"a": {"shape": [2], "data_offsets": [0, 8]}}), "exactly"),
    "entry-without-shape": (container({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "exactly"),
    "entry-without-offsets": (container({"a": {"dtype": "F32", "shape": [2]}}), "exactly"),
    "entry-with-more": (container(one(strides=[1])), "exactly"),
    "dtype-unknown": (container(one(dtype="F33")), "unknown dtype 'F33'"),
    "dtype-lower-case": (container(one(dtype="f32")), "unknown dtype 'f32'"),
    "dtype-torch": (container(one(dtype="float32")), "unknown dtype"),
    "dtype-sub-byte": (container(one(dtype="F4", shape=[16])), "unknown dtype 'F4'"),
    "dtype-number": (container(one(dtype=32)), "unknown dtype 32"),
    "dtype-null": (container(one(dtype=None)), "unknown dtype None"),
    "dtype-list": (container(one(dtype=["F32"])), "unknown dtype"),
    "shape-bool": (container(one(shape=[True, 2])), "impossible shape"),
    "shape-float": (container(one(shape=[2.0])), "impossible shape"),
    "shape-exponent": (container(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}'), "impossible shape"),
    "shape-string": (container(one(shape=["2"])), "impossible shape"),
    "shape-null": (container(one(shape=None)), "impossible shape"),
    "shape-number": (container(one(shape=2)), "impossible shape"),
    "shape-object": (container(one(shape={"0": 2})), "impossible shape"),
    "shape-negative": (container(one(shape=[-2])), "impossible shape"),
    "shape-negative-twice": (container(one(shape=[-1, -2])), "impossible shape"),
    "shape-wraps-to-the-right-size": (container(one(shape=[2**32, 2**30 + 1, 2])), "impossible shape"),
    "shape-of-two-to-the-64": (container(one(shape=[2**64 + 2])), "impossible shape"),
    "shape-overflows-before-a-zero": (container(one(shape=[2**32, 2**32, 0], data_offsets=[0, 0]), b""), "impossible"),
    "shape-huge-beside-a-zero": (container(one(shape=[2**64, 0], data_offsets=[0, 0]), b""), "impossible shape"),
    "shape-huge-after-a-zero": (container(one(shape=[0, 2**64], data_offsets=[0, 0]), b""), "impossible shape"),
    "shape-too-large": (container(one(shape=[3])), "takes 12 bytes"),
    "shape-too-small": (container(one(shape=[1])), "takes 4 bytes"),
    "shape-scalar-of-two": (container(one(shape=[])), "takes 4 bytes"),
    "shape-zero-of-eight": (container(one(shape=[0])), "takes 0 bytes"),
    "dtype-of-other-size": (container(one(dtype="F16")), "takes 4 bytes"),
    "offsets-reversed": (container(one(data_offsets=[8, 0])), "offsets"),
    "offsets-negative": (container(one(data_offsets=[-8, 0])), "offsets"),
    "offsets-bool": (container(one(shape=[], dtype="U8", data_offsets=[False, True]), b"\0"), "offsets"),
    "offsets-float": (container(one(data_offsets=[0, 8.0])), "offsets"),
    "offsets-of-one": (container(one(data_offsets=[8])), "offsets"),
    "offsets-of-three": (container(one(data_offsets=[0, 8, 8])), "offsets"),
    "offsets-empty": (container(one(data_offsets=[])), "offsets"),
    "offsets-null": (container(one(data_offsets=None)), "offsets"),
    "offsets-string": (container(one(data_offsets="08")), "offsets"),
    "offsets-past-the-end": (container(one(data_offsets=[8, 16])), "hole"),
    "offsets-at-two-to-the-64": (container(one(data_offsets=[2**64, 2**64 + 8])), "hole"),
    "hole-at-the-start": (container(one(data_offsets=[1, 9]), b"\0" * 9), "hole"),
    "hole-between": (container(two([0, 3], [4, 8])), "`b` leaves a hole"),
    "overlap-by-one": (container(two([0, 5], [4, 8])), "`b` overlaps"),
    "overlap-same": (container(two([0, 8], [0, 8])), "overlaps"),
    "overlap-inside": (container(two([0, 8], [2, 4])), "`b` overlaps"),
    "overlap-of-an-empty-tensor": (container(two([0, 8], [4, 4])), "overlaps"),
    "empty-tensor-after-a-hole": (container(two([0, 8], [9, 9])), "hole"),
    "body-cut-by-one": (GOOD[:-1], "truncated"),
    "body-missing": (GOOD[:-8], "truncated"),
    "body-trailing-byte": (GOOD + b"\0", "1 bytes that belong to no tensor"),
    "body-without-tensors": (container({}), "8 bytes that belong to no tensor"),
    "body-two-files-in-one": (GOOD + GOOD, "belong to no tensor"),
}
# Stricter than the library, on purpose: where two readers may see different things, or nothing was ever written so.
LIBRARY_ACCEPTS = {
    *("duplicate-tensor", "duplicate-escaped", "duplicate-field", "duplicate-metadata"),
    *("metadata-null", "entry-with-more", "dtype-sub-byte"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_read_header_refuses_and_says_why(case: str, tmp_path: Path) -> None:
    content, says = REFUSED[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert says in caught.value.message
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("case", sorted(set(REFUSED) - LIBRARY_ACCEPTS))
def test_the_library_refuses_the_same_files(case: str, tmp_path: Path) -> None:
    """The corpus is about broken files, not about taste: what only we refuse is listed by name."""
    path = tmp_path / "broken.safetensors"
    path.write_bytes(REFUSED[case][0])
    with pytest.raises((SafetensorError, OSError, ValueError)), safe_open(path, "pt") as stream:
        stream.keys()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    for size in range(len(GOOD)):
        path.write_bytes(GOOD[:size])
        with pytest.raises(FormatError, match=r"cut\.safetensors"):
            read_header(path)
    path.write_bytes(GOOD)
    assert list(read_header(path).tensors) == ["a"]


@REPEATABLE
@given(position=st.integers(0, len(GOOD) - len(BODY) - 1), byte=st.integers(0, 255))
def test_a_damaged_header_never_claims_bytes_outside_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    """One byte of length or header replaced: refused with our error, or a header that still accounts for every byte."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])
    try:
        file = read_header(path)
    except FormatError:
        return
    assert sum(info.size_bytes for info in file.tensors.values()) == len(BODY)
    assert all(info.start + info.size_bytes <= path.stat().st_size for info in file.tensors.values())


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(tmp_path)


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    """`open` on a FIFO waits for a writer that never comes."""
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    started = time.monotonic()
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(path)
    assert time.monotonic() - started < HANG_SECONDS


def test_a_device_is_no_file() -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(Path("/dev/zero"))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b'{"same":0,' + b",".join(b'"%d":0' % i for i in range(300_000)) + b',"same":0}',
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9999"] * 1_000_000) + b'],"data_offsets":[0,8]}}',
    ],
    ids=["many-keys-and-one-repeated", "many-axes"],
)
def test_a_hostile_header_is_refused_in_linear_time(header: bytes, tmp_path: Path) -> None:
    """A count per key, or a product of a million sizes, would take hours on a header of a few megabytes."""
    path = tmp_path / "slow.safetensors"
    path.write_bytes(container(header))
    started = time.monotonic()
    with pytest.raises(FormatError):
        read_header(path)
    assert time.monotonic() - started < HANG_SECONDS


def test_repeated_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json` repeats the JSON key `r`"):
        strict_json(tmp_path / "config.json", b'{"q": 1, "r": 8, "r": 4}')


# What the library writes, we read.


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def check_as_library(path: Path) -> None:
    """Same names, dtypes, shapes, metadata and values as the library sees."""
    file = read_header(path)
    with safe_open(path, "pt") as stream:
        assert set(file.tensors) == set(stream.keys())
        assert dict(file.metadata) == (stream.metadata() or {})
        for name, info in file.tensors.items():
            part, expected = stream.get_slice(name), stream.get_tensor(name)
            assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())
            mapped = file.map(name)
            assert (mapped.dtype, mapped.shape) == (expected.dtype, expected.shape)
            assert as_bytes(mapped) == as_bytes(expected)
            with file.open() as descriptor:
                assert os.pread(descriptor, info.size_bytes, info.start) == as_bytes(expected)
    assert file.size_bytes == path.stat().st_size


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits at all, NaN payloads included; bools stay 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
    return values.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 1, 3, 2), (0,), (3, 0, 2), (1,) * 8]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_and_shape_the_library_writes_is_read_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"t{i}": random_bytes(dtype, shape, i) for i, shape in enumerate(SHAPES)}
    check_as_library(saved(tmp_path / "model.safetensors", tensors))
    assert DTYPES[dtype_name(dtype)] == (8 * dtype.itemsize, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"format": "pt", "ключ": "значение 🤗", "quotes": '"\\\n', "empty": ""}]
)
def test_metadata_the_library_writes_is_read_alike(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    check_as_library(saved(tmp_path / "model.safetensors", {"a": torch.ones(2)}, metadata))


def test_names_the_library_writes_are_read_alike(tmp_path: Path) -> None:
    names = ["", ".", "../x", "a b", "вес", "重み", "🤗", 'quo"te', "back\\slash", "line\nbreak", "nul\0", "x" * 5000]
    tensors = {name: torch.tensor([float(i)]) for i, name in enumerate(names)}
    check_as_library(saved(tmp_path / "model.safetensors", tensors))


def test_a_file_without_tensors_is_read_alike(tmp_path: Path) -> None:
    check_as_library(saved(tmp_path / "model.safetensors", {}))


def test_unaligned_tensors_are_read_alike(tmp_path: Path) -> None:
    """Other writers do not pad or sort: a float may start at any byte."""
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        "c": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [17, 19]},
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(entries, os.urandom(19)))
    check_as_library(path)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container({**two([4, 8], [0, 4]), "z": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}}))
    assert list(read_header(path).tensors) == ["b", "z", "a"]


def test_header_digest_tells_headers_apart_and_not_bodies(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    digests = []
    for content in (GOOD, GOOD[:-1] + b"\xff", GOOD.replace(b'"a"', b'"b"')):
        path.write_bytes(content)
        digests.append(read_header(path).header_digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("shape", "expected"), [((4, 3, 2), 24), ((5,), 4), ((), 4), ((0, 3), 0), ((3, 0), 0)])
def test_row_bytes_is_one_index_of_the_first_axis(shape: tuple[int, ...], expected: int) -> None:
    assert TensorInfo("a", "F32", shape, 0, tensor_bytes("F32", shape)).row_bytes == expected


# `map`


def test_writing_into_a_mapped_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    values = torch.arange(5000, dtype=torch.float32)
    path = saved(tmp_path / "model.safetensors", {"a": values, "b": values + 1})
    before = path.read_bytes()
    file = read_header(path)
    mapped = file.map("b")
    mapped.fill_(-1)
    assert torch.equal(mapped, torch.full((5000,), -1.0))
    assert path.read_bytes() == before
    assert torch.equal(file.map("b"), values + 1)


def test_a_mapped_tensor_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    values = torch.arange(5000, dtype=torch.float32)
    path = saved(tmp_path / "model.safetensors", {"a": values})
    mapped = read_header(path).map("a")
    path.unlink()
    assert torch.equal(mapped, values)


def test_mapping_a_name_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        read_header(saved(tmp_path / "model.safetensors", {"a": torch.ones(1)})).map("b")


# `lay_out`


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    layout = lay_out(((name, dtype_name(value.dtype), tuple(value.shape)) for name, value in tensors.items()), metadata)
    body = b"".join(as_bytes(tensors[name]) for name in layout.tensors)
    path.write_bytes(layout.header + body)
    assert layout.size_bytes == path.stat().st_size
    return path


MIXED = {
    "byte": random_bytes(torch.uint8, (3,), 0),
    "half": random_bytes(torch.bfloat16, (5, 1), 1),
    "wide": random_bytes(torch.int64, (2,), 2),
    "empty": torch.empty(0, 4, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "weight": random_bytes(torch.float32, (3, 3), 3),
}


def test_a_file_laid_out_here_loads_in_the_library(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", MIXED, {"format": "pt", "имя": "🤗"})
    loaded = load_file(path)
    assert {name: as_bytes(value) for name, value in loaded.items()} == {n: as_bytes(v) for n, v in MIXED.items()}
    check_as_library(path)


def test_lay_out_aligns_every_tensor_and_keeps_the_order_otherwise() -> None:
    layout = lay_out([(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in MIXED.items()], {})
    for info in layout.tensors.values():
        assert info.start % (DTYPES[info.dtype][0] // 8) == 0
    assert list(layout.tensors) == ["wide", "empty", "scalar", "weight", "half", "byte"]
    assert len(layout.header) % 8 == 0


def test_lay_out_plans_what_read_header_reads(tmp_path: Path) -> None:
    layout = lay_out([(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in MIXED.items()], {"a": "b"})
    file = read_header(written(tmp_path / "model.safetensors", MIXED, {"a": "b"}))
    assert dict(layout.tensors) == dict(file.tensors)


def test_lay_out_is_golden() -> None:
    """Equal inputs give equal bytes, in every version: caches and digests depend on it."""
    header = lay_out([("b", "F16", (3,)), ("a", "F32", (1, 2))], {"format": "pt"}).header
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert header == len(padded).to_bytes(8, "little") + padded


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        random_bytes,
        st.sampled_from(TORCH_DTYPES),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 2**31),
    ),
    max_size=6,
)


@REPEATABLE
@given(tensors=TENSORS, metadata=st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=12)))
def test_files_written_by_either_side_are_read_alike(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    check_as_library(written(path, tensors, metadata))
    # Given neither tensors nor metadata, but an empty dict for the latter, safetensors 0.8 writes what it cannot read.
    check_as_library(saved(path, tensors, metadata or None))


# Headers that are almost right, built from parts that are each sometimes wrong.
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 2**31, 2**63, 2**64, -1])
WRONG_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "f32", "I4"]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)

WRONG_HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), WRONG_ENTRY, max_size=2)


@settings(REPEATABLE, max_examples=300)
@given(header=WRONG_HEADER, size=st.integers(0, 16))
def test_what_the_library_refuses_we_refuse(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "almost.safetensors"
    path.write_bytes(container(header, b"\0" * size))
    if not accepts(safe_open, path):
        assert not accepts(lambda path, _: read_header(path), path)


def accepts(read: Callable[[Path, str], object], path: Path) -> bool:
    try:
        read(path, "pt")
    except (FormatError, SafetensorError):
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.complex128, torch.qint8])
def test_a_dtype_the_format_lacks_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        dtype_name(dtype)
