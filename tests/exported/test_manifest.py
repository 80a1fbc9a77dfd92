"""The manifest reader against damage, forgery and nonsense."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.exported.errors import BundleDamaged, BundleMismatch, SmcError
from smc.exported.manifest import decode_manifest, encode_manifest
from tests.bundles import FILES, FUZZ, NO_DIGEST, describe, reseal, sample_manifest

MANIFEST = sample_manifest(describe(FILES))
BYTES = encode_manifest(MANIFEST)
FIELDS: dict[str, Any] = {key: value for key, value in json.loads(BYTES).items() if key != "digest"}

unicode = st.text(st.characters(exclude_categories=["Cs"]))


def sealed(fields: Any) -> bytes:
    """Fields as a manifest's bytes, with the right digest."""
    return reseal(json.dumps(fields | {"digest": "0" * 64}).encode())


def sealed_text(old: bytes, new: bytes) -> bytes:
    """The manifest's text with a part replaced, with the right digest."""
    text = json.dumps(FIELDS | {"digest": "0" * 64}).encode()
    assert text.count(old) == 1
    return reseal(text.replace(old, new))


def changed(change: Callable[[Any], object]) -> bytes:
    """The manifest after a change to its fields, with the right digest."""
    fields = copy.deepcopy(FIELDS)
    change(fields)
    return sealed(fields)


def test_a_manifest_reads_back_as_written() -> None:
    assert decode_manifest(BYTES) == MANIFEST
    assert decode_manifest(sealed(FIELDS)) == MANIFEST


@settings(FUZZ)
@given(unicode, unicode, st.none() | unicode, st.dictionaries(unicode, st.none() | st.integers() | unicode))
def test_any_text_survives(key: str, name: str, sm: str | None, config: dict[str, Any]) -> None:
    fields = copy.deepcopy(FIELDS)
    fields["build_key"], fields["target"], fields["model"]["config"] = key, {"gpu": name, "sm": sm}, config
    manifest = decode_manifest(sealed(fields))
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert (manifest.build_key, manifest.target.gpu, manifest.target.sm, manifest.model.config) == (key, name, sm, config)


def test_every_flipped_bit_is_found() -> None:
    for position in range(len(BYTES)):
        for bit in range(8):
            data = bytearray(BYTES)
            data[position] ^= 1 << bit
            with pytest.raises(BundleDamaged):
                decode_manifest(bytes(data))


def test_every_truncation_and_repetition_is_found() -> None:
    for position in range(len(BYTES)):
        with pytest.raises(BundleDamaged):
            decode_manifest(BYTES[:position])
        with pytest.raises(BundleDamaged):
            decode_manifest(BYTES + BYTES[position:])


def one_file(name: str) -> dict[str, Any]:
    return FIELDS["files"] | {name: {"size": 0, "sha256": "0" * 64}}


FORGERIES = {
    "unknown key at the top": sealed(FIELDS | {"extra": 1}),
    "unknown key below": changed(lambda f: f["target"].update(extra=1)),
    "unknown key of a file": changed(lambda f: f["files"]["empty"].update(mode=1)),
    "unknown stage": changed(lambda f: f["stages"].update(refiner="empty")),
    "stage that is no file": changed(lambda f: f["stages"].update(decoder="../decoder.onnx")),
    "stage missing": changed(lambda f: f["stages"].pop("decoder")),
    "duplicate key": sealed_text(b'"precision": "fp32"', b'"precision": "fp32", "precision": "fp16"'),
    "duplicate key, escaped": sealed_text(b'"precision": "fp32"', rb'"precision": "fp32", "\u0070recision": "fp32"'),
    "duplicate file": sealed_text(b'"empty": {', b'"empty": {"size": 1, "sha256": "' + b"0" * 64 + b'"}, "empty": {'),
    "second digest": sealed(FIELDS | {"model": FIELDS["model"] | {"config": {"digest": "0" * 64}}}),
    "digest not at the top": reseal(sealed_text(NO_DIGEST[:8], b'"digest" ').replace(b'"depth": 2', NO_DIGEST)),
    "no digest": json.dumps(FIELDS).encode(),
    "upper-case digest": BYTES.replace(json.loads(BYTES)["digest"].encode(), json.loads(BYTES)["digest"].upper().encode()),
    "text of another type": sealed(FIELDS | {"precision": 32}),
    "number as text": changed(lambda f: f["files"]["empty"].update(size="0")),
    "fraction for a count": changed(lambda f: f["files"]["empty"].update(size=0.0)),
    "truth for a count": changed(lambda f: f["files"]["empty"].update(size=False)),
    "null": sealed(FIELDS | {"stages": None}),
    "list for an object": sealed(FIELDS | {"files": []}),
    "three coordinates": changed(lambda f: f["verification"]["pairs"][0]["outputs"]["conf1"].update(worst_at=[1, 2, 3])),
    "format as text": sealed(FIELDS | {"format": "1"}),
    "format true": sealed(FIELDS | {"format": True}),
    "format 1.0": sealed(FIELDS | {"format": 1.0}),
    "NaN": sealed_text(b"1.5e-06", b"NaN"),
    "infinity": sealed_text(b"1.5e-06", b"-Infinity"),
    "infinity by overflow": sealed_text(b"1.5e-06", b"1e999"),
    "huge number": sealed_text(b"1.5e-06", b"9" * 400),
    "number too long to read": sealed_text(b"1.5e-06", b"9" * 5000),
    "negative size": changed(lambda f: f["files"]["empty"].update(size=-1)),
    "short hash": changed(lambda f: f["files"]["empty"].update(sha256="0" * 63)),
    "hash and newline": changed(lambda f: f["files"]["empty"].update(sha256="0" * 64 + "\n")),
    "no shapes": sealed(FIELDS | {"shapes": []}),
    "shape of 0": sealed(FIELDS | {"shapes": [{"height": 0, "width": 16}]}),
    "negative shape": sealed(FIELDS | {"shapes": [{"height": -16, "width": 16}]}),
    "shape of 17": sealed(FIELDS | {"shapes": [{"height": 16, "width": 17}]}),
    "nothing verified": changed(lambda f: f["verification"].update(pairs=[])),
    "no outputs verified": changed(lambda f: f["verification"]["pairs"][0].update(outputs={})),
    "deep nesting": sealed_text(b'"depth": 2', b'"depth": ' + b"[" * 100_000 + b"]" * 100_000),
    "half a surrogate pair in a key": sealed(FIELDS | {"\ud800": 1}),
    "half a surrogate pair in a value": sealed(FIELDS | {"precision": "\udc80"}),
    "surrogate in UTF-8": sealed_text(b"fp32", b"\xed\xa0\x80"),
    "Latin-1": sealed_text(b"fp32", b"gr\xf6\xdfe"),
    "byte order mark": sealed_text(b'{"format"', b'\xef\xbb\xbf{"format"'),
    "text after the end": reseal(json.dumps(FIELDS | {"digest": "0" * 64}).encode() + b"{}"),
    "list at the top": reseal(b"[{" + NO_DIGEST + b"}]"),
    **{f"missing {key}": sealed({name: value for name, value in FIELDS.items() if name != key}) for key in FIELDS},
    **{
        f"file {name!r}": sealed(FIELDS | {"files": one_file(name)})
        for name in ("../x", "/etc/passwd", "a/b", "a\\b", ".", "..", ".hidden", "", "-x", "x\n", "x\0", "manifest.json", "ä", "x" * 129)
    },
}


@pytest.mark.parametrize("data", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forgery_with_the_right_digest_is_refused(data: bytes) -> None:
    with pytest.raises(BundleDamaged) as caught:
        decode_manifest(data)
    assert caught.value.exit_status == 76
    assert "hash to" not in str(caught.value), "the digest, not the check itself, refused it"


@pytest.mark.parametrize("fields", [{"format": 2}, {"format": 10**30, "wholly": "different"}, FIELDS | {"format": 0}])
def test_another_format_is_a_mismatch_and_not_damage(fields: dict[str, Any]) -> None:
    with pytest.raises(BundleMismatch, match=rf"format {fields['format']}.*reads format 1") as caught:
        decode_manifest(sealed(fields))
    assert caught.value.exit_status == 77
    with pytest.raises(BundleDamaged):
        decode_manifest(sealed(fields).replace(b'"format": ', b'"format":  '))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(sorted(FIELDS)), inner, max_size=4),
    max_leaves=8,
)


def read_or_refuse(data: bytes) -> None:
    try:
        manifest = decode_manifest(data)
    except SmcError:
        return
    assert decode_manifest(encode_manifest(manifest)) == manifest


@settings(FUZZ, max_examples=300)
@given(st.binary() | st.binary().map(lambda data: reseal(data + NO_DIGEST)))
def test_arbitrary_bytes(data: bytes) -> None:
    read_or_refuse(data)


@settings(FUZZ, max_examples=150)
@given(st.dictionaries(st.text() | st.sampled_from(sorted(FIELDS)), json_values))
def test_arbitrary_json(fields: dict[str, Any]) -> None:
    read_or_refuse(sealed(fields))


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_one_value_replaced_by_anything(data: st.DataObject) -> None:
    fields = copy.deepcopy(FIELDS)
    node: Any = fields
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not node[key] or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
            break
        node = node[key]
    if data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(json_values)
    read_or_refuse(sealed(fields))


@settings(FUZZ, max_examples=500)
@given(st.integers(0, len(BYTES)), st.integers(0, 8), st.binary(max_size=8))
def test_a_spliced_text_with_the_right_digest(position: int, cut: int, insert: bytes) -> None:
    text = json.dumps(FIELDS | {"digest": "0" * 64}).encode()
    read_or_refuse(reseal(text[:position] + insert + text[position + cut :]))
