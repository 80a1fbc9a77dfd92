"""Configurations from both layouts: what is read, and that nothing but a plain description is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.compiler.config import PRESETS, ModelConfig, parse_model_string, read_config_json, resolve_config
from smc.exported.errors import BadCheckpoint, BadInput, InputMissing
from tests.conformance import DATA

PUBLIC = (
    "AsymmetricMASt3R(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(512, 512), head_type='catmlp+dpt', "
    "output_mode='pts3d+desc24', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), enc_embed_dim=1024, enc_depth=24, "
    "enc_num_heads=16, dec_embed_dim=768, dec_depth=12, dec_num_heads=12, two_confs=True, desc_conf_mode=('exp', 0, inf))"
)
"""The model string of the public checkpoint."""

REQUIRED: dict[str, Any] = {"enc_num_heads": 16, "dec_num_heads": 12, "desc_conf_mode": ("exp", 0, "inf")}


def call(arguments: str) -> str:
    """A model string that is right but for these further arguments."""
    required = ", ".join(f"{name}={value!r}" for name, value in REQUIRED.items())
    return f"AsymmetricMASt3R({required}, {arguments})"


def short(value: str | bytes) -> str:
    """A test's name from its parameter, which may be a megabyte."""
    return ascii(value)[:60]


def model_string(config: ModelConfig) -> str:
    return f"AsymmetricMASt3R({', '.join(f'{name}={value!r}' for name, value in dataclasses.asdict(config).items())})"


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a hostile string's `touch X` would leave its mark."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_public_model_string_is_the_large_preset() -> None:
    assert parse_model_string(PUBLIC) == PRESETS["large"]


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "landscape_only=False, freeze='mask', mask_ratio=0.9",
        "patch_embed_cls='PatchEmbedDust3R'",
        "img_size=512",
        "conf_mode=['exp', 1.0, float('inf')]",
        "depth_mode=('exp', -float('inf'), inf)",
        "depth_mode=('exp', float('-inf'), 'inf')",
        "\n",
    ],
)
def test_other_spellings_of_the_public_model(arguments: str) -> None:
    assert parse_model_string(f"  {call(arguments)}\n") == PRESETS["large"]


@pytest.mark.parametrize("name", ["tiny_landscape", "tiny_portrait_mixed", "large_160x224"])
def test_conformance_configurations_read(name: str) -> None:
    path = DATA / f"{name}.config.json"
    config = read_config_json(path)
    for field, value in json.loads(path.read_text()).items():
        if field != "landscape_only":
            assert getattr(config, field) == (tuple(value) if isinstance(value, list) else value), field
    assert (config == PRESETS["large"]) == name.startswith("large")


def test_derived_values() -> None:
    config = PRESETS["large"]
    assert (config.rope_base, config.desc_dim, config.dpt_hooks) == (100.0, 24, (0, 6, 9, 12))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not an expression"),
        ("   \n", "not an expression"),
        ("AsymmetricMASt3R(", "not an expression"),
        ("AsymmetricMASt3R() AsymmetricMASt3R()", "not an expression"),
        ("x = AsymmetricMASt3R()", "not an expression"),
        ("import os", "not an expression"),
        ("AsymmetricMASt3R(enc_depth=24, 12)", "not an expression"),
        ("AsymmetricMASt3R(enc_depth=" + "9" * 5000 + ")", "not an expression"),
        ("AsymmetricMASt3R()\0", "not an expression"),
        ("\ud800", "not an expression"),
        ("(" * 9_000, "not an expression"),
        ("-" * 9_000 + "1", "not an expression"),
        ("(" * 1_000_000, "1,000,000 characters"),
        ("AsymmetricMASt3R", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricMASt3R(24)", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricMASt3R(*())", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricMASt3R()()", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricMASt3R().eval()", "is not AsymmetricMASt3R(name=value, ...)"),
        ("[AsymmetricMASt3R()][0]", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricMASt3R() if True else 1", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricCroCo3DStereo(enc_depth=24)", "is not AsymmetricMASt3R(name=value, ...)"),
        ("mast3r.model.AsymmetricMASt3R()", "is not AsymmetricMASt3R(name=value, ...)"),
        ("__import__('os').system('touch X')", "is not AsymmetricMASt3R(name=value, ...)"),
        ("exec(\"open('X', 'w')\")", "is not AsymmetricMASt3R(name=value, ...)"),
        ("open('X', 'w')", "is not AsymmetricMASt3R(name=value, ...)"),
        ("(lambda: open('X', 'w'))()", "is not AsymmetricMASt3R(name=value, ...)"),
        ("f\"{open('X', 'w')}\"", "is not AsymmetricMASt3R(name=value, ...)"),
        ("AsymmetricMASt3R()", "enc_num_heads is missing"),
        ("AsymmetricMASt3R(enc_num_heads=16, dec_num_heads=12)", "desc_conf_mode is missing"),
    ],
    ids=short,
)
def test_what_is_no_call_of_the_model_is_refused(text: str, complaint: str, empty_cwd: Path) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        parse_model_string(text)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not list(empty_cwd.iterdir())


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("enc_depth=__import__('os').system('touch X')", "not a literal"),
        ("enc_depth=open('X', 'w').fileno()", "not a literal"),
        ("enc_depth=(open('X', 'w'), 24)[1]", "not a literal"),
        ("enc_depth=[open('X', 'w') for _ in 'a']", "not a literal"),
        ("enc_depth=(x := open('X', 'w'))", "not a literal"),
        ("enc_depth=lambda: open('X', 'w')", "not a literal"),
        ("enc_depth=await open('X', 'w')", "not a literal"),
        ("enc_depth=-open('X', 'w')", "not a literal"),
        ("pos_embed=f'RoPE{100}'", "not a literal"),
        ("pos_embed=b'RoPE100'", "not a literal"),
        ("pos_embed='RoPE' + '100'", "not a literal"),
        ("enc_depth=24 + 0", "not a literal"),
        ("enc_depth=24j", "not a literal"),
        ("enc_depth=...", "not a literal"),
        ("enc_depth=--24", "not a literal"),
        ("enc_depth=-True", "not a literal"),
        ("enc_depth=+24", "not a literal"),
        ("enc_depth=int('24')", "not a literal"),
        ("enc_depth=depth", "not a literal"),
        ("conf_mode=('exp', 1, nan)", "not a literal"),
        ("conf_mode=('exp', 1, float('nan'))", "not a literal"),
        ("conf_mode=('exp', 1, float('inf', x=1))", "not a literal"),
        ("conf_mode=('exp', 1, float.__call__('inf'))", "not a literal"),
        ("conf_mode=('exp', 1, (inf))" + "[0]" * 1_000, "not a literal"),
        ("conf_mode=(('exp',), 1, inf)", "not a literal"),
        ("conf_mode={'exp': 1}", "not a literal"),
        ("enc_depth=" + "-" * 900 + "24", "not a literal"),
        ("enc_depth=" + "24+" * 900 + "0", "not a literal"),
        ("enc_depth=" + "f(" * 90 + "24" + ")" * 90, "not a literal"),
        ("enc_depth=" + "x." * 900 + "x", "not a literal"),
        ("**{}", "unpacks arguments"),
        ("**{'enc_depth': 24}", "unpacks arguments"),
        ("mlp_ratio=4, mlp_ratio=4", "'mlp_ratio' twice"),
        ("__class__=1", "unknown field '__class__'"),
        ("freeze_encoder=True", "unknown field 'freeze_encoder'"),
        ("enc_depth=None", "enc_depth is None"),
        ("enc_depth='24'", "enc_depth is '24'"),
        ("enc_depth=24.0", "enc_depth is 24.0"),
        ("enc_depth=True", "enc_depth is True"),
        ("enc_depth=(24,)", "enc_depth is (24,)"),
        ("enc_depth=0", "enc_depth is 0"),
        ("enc_depth=-24", "enc_depth is -24"),
        ("enc_depth=inf", "enc_depth is inf"),
        ("enc_depth=257", "at most 256"),
        ("dec_depth=1_000_000_000", "at most 65536"),
        ("enc_embed_dim=0x" + "f" * 5_000, "at most 65536"),
        ("conf_mode=('exp', 0x" + "f" * 5_000 + ", inf)", "at most 65536"),
        ("conf_mode=('exp', 0x" + "f" * 5_000 + ")", "conf_mode is a number of thousands of digits"),
        ("two_confs=1", "two_confs is 1"),
        ("pos_embed=100", "pos_embed is 100"),
        ("pos_embed=('RoPE100',)", "pos_embed is ('RoPE100',)"),
        ("img_size=True", "img_size is True"),
        ("img_size=0", "img_size is 0"),
        ("img_size=(512, -512)", "img_size is -512"),
        ("img_size=(512,)", "img_size is (512,)"),
        ("dpt_level_dims=(96, 192, 384)", "dpt_level_dims is (96, 192, 384)"),
        ("dpt_level_dims='abcd'", "dpt_level_dims is 'abcd'"),
        ("dpt_dim=255", "dpt_dim 255 is odd"),
        ("desc_mlp_ratio=0", "desc_mlp_ratio 0.0, above 0"),
        ("desc_mlp_ratio=-0.5", "desc_mlp_ratio -0.5, above 0"),
        ("desc_mlp_ratio=inf", "desc_mlp_ratio inf, above 0"),
        ("desc_mlp_ratio=1e-9", "no hidden channel"),
        ("desc_mlp_ratio='4'", "desc_mlp_ratio is '4'"),
        ("conf_mode='exp'", "conf_mode is 'exp'"),
        ("conf_mode=('exp', 1)", "conf_mode is ('exp', 1)"),
        ("conf_mode=('exp', '1', inf)", "conf_mode is '1'"),
        ("conf_mode=('exp', True, inf)", "conf_mode is True"),
        ("conf_mode=(1, 1, inf)", "conf_mode is 1"),
        ("conf_mode=('tanh', 1, inf)", "conf_mode 'tanh'"),
        ("conf_mode=('exp', 2, 1)", "bounds 2.0 to 1.0 are empty"),
        ("conf_mode=('exp', inf, inf)", "are empty"),
        ("conf_mode=('exp', -inf, inf)", "lower bound must be finite"),
        ("conf_mode=('sigmoid', 0, inf)", "upper bound must be finite"),
        ("depth_mode=('exp', 0, inf)", "cannot be bounded"),
        ("depth_mode=('sigmoid', -inf, inf)", "depth_mode 'sigmoid'"),
        ("enc_embed_dim=1000", "not a multiple of enc_num_heads 16"),
        ("dec_embed_dim=24", "not a multiple of 4"),
        ("dec_depth=3", "at least 4"),
        ("patch_size=14", "patch_size 14"),
        ("patch_embed_cls='PatchEmbed'", "patch_embed_cls 'PatchEmbed'"),
        ("head_type='linear'", "head_type 'linear'"),
        ("desc_mode='none'", "desc_mode 'none'"),
        ("pos_embed='cosine'", "pos_embed 'cosine'"),
        ("pos_embed='RoPE0'", "pos_embed 'RoPE0'"),
        ("pos_embed='RoPE" + "9" * 400 + "'", "pos_embed 'RoPE999"),
        ("pos_embed='RoPE١٠٠'", "pos_embed 'RoPE"),
        ("output_mode='pts3d'", "output_mode 'pts3d'"),
        ("output_mode='pts3d+desc0'", "output_mode 'pts3d+desc0'"),
        ("output_mode='pts3d+desc24\\n'", "output_mode 'pts3d+desc24"),
        ("output_mode='pts3d+desc99999'", "output_mode 'pts3d+desc99999'"),
    ],
    ids=short,
)
def test_bad_arguments_are_refused_and_never_evaluated(argument: str, complaint: str, empty_cwd: Path) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        parse_model_string(call(argument))
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not list(empty_cwd.iterdir())


FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
FRAGMENTS = [
    "AsymmetricMASt3R",
    "(",
    ")",
    "[",
    "]",
    ",",
    "=",
    "-",
    "**",
    "'",
    "inf",
    "float",
    "'exp'",
    "f'{1}'",
    "lambda:",
    ".",
    "0x",
    *FIELDS,
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["exp", "inf", "-inf", "RoPE100", 4, 16]),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(), items, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300, database=None)
@given(st.text() | st.lists(st.text() | st.sampled_from(FRAGMENTS)).map("".join).flatmap(lambda text: st.sampled_from([text, call(text)])))
def test_any_text_gives_a_configuration_or_bad_checkpoint(text: str) -> None:
    with contextlib.suppress(BadCheckpoint):
        assert isinstance(parse_model_string(text), ModelConfig)


@settings(deadline=None, max_examples=300, database=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "freeze"]) | st.text(), JSON_VALUES, max_size=3))
def test_any_fields_give_a_configuration_or_bad_checkpoint(fields: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_fields(REQUIRED | fields)
    except BadCheckpoint:
        return
    assert ModelConfig.from_fields(config.to_json()) == config


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), ModelConfig(conf_mode=("sigmoid", -0.5, 2.5), depth_mode=("square", -float("inf"), float("inf")), two_confs=False)],
)
def test_round_trips(config: ModelConfig, tmp_path: Path) -> None:
    text = json.dumps(config.to_json(), allow_nan=False)
    assert ModelConfig.from_fields(json.loads(text)) == config
    assert parse_model_string(model_string(config)) == config
    path = tmp_path / "config.json"
    path.write_text(text)
    assert resolve_config(str(path)) == config


def test_one_confidence_needs_no_mode_for_the_other() -> None:
    assert not ModelConfig.from_fields({"enc_num_heads": 16, "dec_num_heads": 12, "two_confs": False}).two_confs


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not JSON"),
        (b"<html></html>", "not JSON"),
        (b'{"enc_depth": 24', "not JSON"),
        (b'\xef\xbb\xbf{"enc_depth": 24}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"enc_depth": 1' + b"0" * 5_000 + b"}", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"null", "a JSON object was expected"),
        (b'["enc_depth", 24]', "a JSON object was expected"),
        (b"{}", "enc_num_heads is missing"),
        (b'{"enc_depth": 1' + b"0" * 4_000 + b"}", "at most 65536"),
        (b'{"enc_num_heads": 16, "dec_num_heads": 12, "desc_conf_mode": ["exp", NaN, Infinity]}', "are empty"),
        (b'{"conf_mode": [["exp"], 1, Infinity]}', "conf_mode is ['exp']"),
        (b'{"enc_depth": ' + b"[" * 500 + b"]" * 500 + b"}", "enc_depth is [[[[[["),
        (b'{"architectures": ["ViT"]}', "unknown field 'architectures'"),
    ],
    ids=short,
)
def test_bad_config_json_is_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        read_config_json(path)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", ".", "a" * 5_000], ids=short)
def test_unreadable_config_json_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        read_config_json(tmp_path / name)


@pytest.mark.parametrize("name", ["", "huge", "Large", "nowhere/config.json", "a" * 5_000, "a\0b"], ids=short)
def test_neither_preset_nor_file_is_bad_input(name: str) -> None:
    with pytest.raises(BadInput, match=r"neither one of large, small, pocket nor a config\.json") as caught:
        resolve_config(name)
    assert len(str(caught.value)) < 500


def test_presets_resolve_by_name() -> None:
    assert {name: resolve_config(name) for name in PRESETS} == PRESETS
