"""Adapter folders that lie: what is done to a good one, and the answer to expect."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE
from tests.adapters.support import CONFIG, PREFIX, tensors, write_adapter

Header = dict[str, Any]
A0, B0 = (f"{PREFIX}h.0.attn.c_attn.lora_{side}.weight" for side in "AB")


def parts(folder: Path) -> tuple[Header, bytes]:
    raw = (folder / WEIGHTS_FILE).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:start]), raw[start:]


def write_raw(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    length = len(header) if length is None else length
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + header + data)


def header(change: Callable[[Header], object]) -> Callable[[Path], None]:
    """A folder whose weights' header was changed; the data stay."""

    def made(folder: Path) -> None:
        entries, data = parts(folder)
        change(entries)
        write_raw(folder, json.dumps(entries).encode(), data)

    return made


def field(name: str, value: Any) -> Callable[[Path], None]:
    return header(lambda entries: entries[A0].__setitem__(name, value))


def text(old: str, new: str) -> Callable[[Path], None]:
    """The header's JSON with its first `old` replaced."""

    def made(folder: Path) -> None:
        entries, data = parts(folder)
        plain = json.dumps(entries)
        assert old in plain
        write_raw(folder, plain.replace(old, new, 1).encode(), data)

    return made


def config(content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data)


def settings(**fields: Any) -> Callable[[Path], object]:
    return config(json.dumps(CONFIG | fields))


def value(dtype: str, bits: int) -> Callable[[Path], None]:
    """One number of A0 replaced by these bits, in a file of this dtype."""

    def made(folder: Path) -> None:
        entries, data, place = {}, b"", 0
        for name, array in sorted(load_file(folder / WEIGHTS_FILE).items()):
            whole = array.astype("<f4")
            match dtype:
                case "F32":
                    words = whole.view("<u4").copy()
                case "F16":
                    words = whole.astype("<f2").view("<u2").copy()
                case _:
                    words = (whole.view("<u4") >> 16).astype("<u2")
            if name == A0:
                words.flat[5] = bits
            raw = words.tobytes()
            entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [place, place + len(raw)]}
            data, place = data + raw, place + len(raw)
        write_raw(folder, json.dumps(entries).encode(), data)

    return made


def of_dtype(dtype: str) -> Callable[[Path], None]:
    return lambda folder: save_file(
        {k: v.astype(dtype) for k, v in load_file(folder / WEIGHTS_FILE).items()}, folder / WEIGHTS_FILE
    )


def zeroed(folder: Path) -> None:
    write_adapter(folder, {k: np.zeros_like(v) if ".lora_B." in k else v for k, v in tensors().items()})


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def in_place_of(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return made


def shift(begin: int, end: int) -> Callable[[Path], None]:
    return header(
        lambda h: h[A0].__setitem__("data_offsets", [h[A0]["data_offsets"][0] + begin, h[A0]["data_offsets"][1] + end])
    )


def first_at(begin: int) -> Callable[[Path], None]:
    """Every tensor is `begin` bytes further on."""

    def change(entries: Header) -> None:
        for fields in (e for n, e in entries.items() if n != "__metadata__"):
            fields["data_offsets"] = [place + begin for place in fields["data_offsets"]]

    return header(change)


def on_top_of_another(entries: Header) -> None:
    entries[A0]["data_offsets"] = entries[A0.replace("h.0", "h.1")]["data_offsets"]


BAD_JSON = f"the header of {WEIGHTS_FILE} is not valid JSON"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle alone": (only_pickle, "adapter_model.bin is a pickle: convert it to safetensors"),
    "a pickle by the right name": (
        lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x80\x04\x95" + b"c__builtin__\neval\n" * 9),
        f"{WEIGHTS_FILE} is not a valid safetensors file",
    ),
    "a header of 2**60 bytes": (
        lambda f: write_raw(f, b"{}", b"", 1 << 60),
        "a header of 1,152,921,504,606,846,976 ann",
    ),
    "a header of 2**64-1 bytes": (
        lambda f: write_raw(f, b"{}", b"", 2**64 - 1),
        "18,446,744,073,709,551,615 announced",
    ),
    "a header of 3 MiB": (lambda f: write_raw(f, b" " * (3 << 20), b""), "has a header of 3,145,728 bytes; at most"),
    "a header of nothing": (lambda f: write_raw(f, b"", b"xx"), "a header of 0 announced"),
    "a header that ends early": (lambda f: write_raw(f, b"{}" + b" " * 30, b"", 1), "a header of 1 announced"),
    "a header nested deep": (lambda f: write_raw(f, b'{"a":' * 90000, b""), f"{BAD_JSON}: nested deeper than 16"),
    "a header nested a little": (
        field("shape", [[[[[[[[[[[[[[[[2]]]]]]]]]]]]]]]]),
        f"{BAD_JSON}: nested deeper than 16",
    ),
    "a header that is no UTF-8": (lambda f: write_raw(f, b'{"\xff": 1}', b""), f"{BAD_JSON}: 'utf-8' codec"),
    "a header with NaN": (text("24, 2", "NaN, 2"), f"{BAD_JSON}: NaN is no JSON value"),
    "a key twice in the header": (text(f'"{B0}"', f'"{A0}"'), f"{BAD_JSON}: the key '{A0}' comes twice"),
    "a field twice": (
        text('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"'),
        f"{BAD_JSON}: the key 'dtype' comes twice",
    ),
    "half a surrogate pair": (text('"format"', r'"\ud800"'), f"{BAD_JSON}: a string holds half a surrogate pair"),
    "metadata that is a list": (
        header(lambda h: h.__setitem__("__metadata__", [])),
        "__metadata__ of .* not an object",
    ),
    "metadata of numbers": (header(lambda h: h.__setitem__("__metadata__", {"a": 1})), "is not an object of strings"),
    "5000 tensors": (
        header(lambda h: h.update({str(i): h[A0] for i in range(5000)})),
        "holds 5008 tensors, at most 4096",
    ),
    "a tensor that is a number": (header(lambda h: h.__setitem__(A0, 3)), f"'{A0}' has no dtype, shape and data_off"),
    "a tensor without a shape": (header(lambda h: h[A0].pop("shape")), f"'{A0}' has no dtype, shape and data_offsets"),
    "a field too many": (field("scale", 3), f"'{A0}' has no dtype, shape and data_offsets alone"),
    "a name of 999 characters": (header(lambda h: h.__setitem__("x" * 999, h.pop(A0))), "name has 999 characters"),
    "a name in look-alikes": (header(lambda h: h.__setitem__(A0.replace("o", "о"), h.pop(A0))), "is not a LoRA weight"),
    "a name in other digits": (
        header(lambda h: h.__setitem__(A0.replace("0", "٠"), h.pop(A0))),
        "is not a LoRA weight",
    ),
    "a name with leading zeros": (
        header(lambda h: h.__setitem__(A0.replace("h.0", "h.00"), h.pop(A0))),
        "is not a LoRA weight",
    ),
    "a dtype that is a list": (field("dtype", ["F32"]), rf"'{A0}' is \['F32'\]; expected one of F32, F16, BF16"),
    "an unknown dtype": (field("dtype", "Q4_0" * 99), f"'{A0}' is Q4_0Q4_0Q4_0Q4_0Q4_0; expected one of"),
    "a negative size": (field("shape", [-2, -8]), rf"'{A0}' has shape \[-2, -8\]; expected a list of sizes"),
    "a size that is -0": (text("[2, 8]", "[-0, 8]"), f"{BAD_JSON}: -0 is no integer"),
    "a size that is a float": (field("shape", [2.0, 8]), rf"'{A0}' has shape \[2.0, 8\]; expected a list of sizes"),
    "a size that is true": (field("shape", [True, 16]), rf"'{A0}' has shape \[True, 16\]; expected a list"),
    "a size that is text": (field("shape", "28"), f"'{A0}' has shape 28; expected a list of sizes"),
    "a huge size": (field("shape", [2**63, 2]), rf"'{A0}' has shape \[9223372036854775808, 2\]; expected"),
    "sizes that overflow": (
        field("shape", [2**32, 2**32]),
        f"'{A0}' takes 64 bytes in the file; F32 of shape .* needs",
    ),
    "a size of 5000 digits": (text("[2, 8]", f"[{'9' * 5000}]"), f"{BAD_JSON}: Exceeds the limit"),
    "nine dimensions": (field("shape", [1] * 7 + [2, 8]), f"'{A0}' has shape .* expected a list of sizes"),
    "a shape that needs more": (
        field("shape", [3, 8]),
        rf"'{A0}' takes 64 bytes in the file; F32 of shape \(3, 8\) needs 96",
    ),
    "a dtype that needs less": (field("dtype", "F16"), f"'{A0}' takes 64 bytes in the file; F16 of shape .* needs 32"),
    "offsets that are floats": (
        field("data_offsets", [0.0, 64.0]),
        rf"'{A0}' has data_offsets \[0.0, 64.0\]; expected two",
    ),
    "offsets that are booleans": (
        field("data_offsets", [False, True]),
        f"'{A0}' has data_offsets .*expected two offsets",
    ),
    "one offset": (field("data_offsets", [64]), f"'{A0}' has data_offsets .64.; expected two offsets"),
    "negative offsets": (field("data_offsets", [-64, 0]), f"'{A0}' has data_offsets .-64, 0.; expected two offsets"),
    "offsets backwards": (field("data_offsets", [64, 0]), f"'{A0}' takes -64 bytes in the file"),
    "huge offsets": (field("data_offsets", [2**60, 2**60 + 64]), f"'{A0}' has data_offsets .*; expected two offsets"),
    "offsets outside the file": (field("data_offsets", [1 << 40, (1 << 40) + 64]), "begins at byte"),
    "a gap": (shift(4, 4), "begins at byte .* the one before ends at"),
    "an overlap": (header(on_top_of_another), "begins at byte .* the one before ends at"),
    "a gap before the first": (first_at(64), "begins at byte .* the one before ends at"),
    "bytes behind the last": (
        lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes() + b"x"),
        "its tensors end at byte .*, the file at",
    ),
    "NaN in F32": (value("F32", 0x7FC00000), f"'{A0}' holds values that are not finite"),
    "-Inf in F32": (value("F32", 0xFF800000), f"'{A0}' holds values that are not finite"),
    "NaN in F16": (value("F16", 0x7E00), f"'{A0}' holds values that are not finite"),
    "Inf in F16": (value("F16", 0x7C00), f"'{A0}' holds values that are not finite"),
    "NaN in BF16": (value("BF16", 0x7F81), f"'{A0}' holds values that are not finite"),
    "-Inf in BF16": (value("BF16", 0xFF80), f"'{A0}' holds values that are not finite"),
    "integers": (of_dtype("int8"), "is I8; expected one of F32, F16, BF16"),
    "doubles": (of_dtype("float64"), "is F64; expected one of F32, F16, BF16"),
    "no effect": (zeroed, "the adapter has no effect: B A is zero in every module"),
    "a key twice in the config": (
        config('{"peft_type": "LORA", "r": 2, "r": 4}'), f"{CONFIG_FILE} is not valid JSON: the key 'r' comes twice"
    ),
    "a key twice inside": (
        config('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}'), "not valid JSON: the key 'a' comes twice"
    ),
    "a config of 2 MiB": (config(" " * (2 << 20)), f"{CONFIG_FILE} has 2,097,152 bytes; at most 1,048,576 are read"),
    "a config nested deep": (config("[" * 500_000), f"{CONFIG_FILE} is not valid JSON: nested deeper than 16"),
    "a field nested deep": (settings(x=json.loads("[" * 40 + "]" * 40)), "not valid JSON: nested deeper than 16"),
    "a config with a null byte": (config(b'{"r": 2\0}'), f"{CONFIG_FILE} is not valid JSON"),
    "a config with a byte order mark": (config(b"\xef\xbb\xbf{}"), f"{CONFIG_FILE} is not valid JSON"),
    "an alpha of NaN": (config('{"peft_type": "LORA", "lora_alpha": NaN}'), "NaN is no JSON value"),
    "an alpha of 1e999": (config('{"peft_type": "LORA", "lora_alpha": 1e999}'), "lora_alpha is inf: expected a finite"),
    "a rank of a billion": (settings(r=10**9), "rank 1000000000 of h.0.attn.c_attn is not an integer from 1 to 512"),
    "a value of 900 KiB": (settings(x="y" * 900_000), r"x is 'y+\.\.\.: this field is not supported"),
    "a base's name of 900 KiB": (settings(base_model_name_or_path="y" * 900_000), "path has 900,000 characters"),
    "a base's name cut in half": (settings(base_model_name_or_path="\ud83d"), "half a surrogate pair"),
    "targets in look-alikes": (settings(target_modules=["с_attn"]), "name no projection of this GPT-2"),
    "a target upwards": (settings(target_modules=["../../c_attn"]), "name no projection of this GPT-2"),
    "a pattern that backtracks": (settings(target_modules="(a+)+$"), "or with a repeated group"),
    "a pipe as weights": (in_place_of(WEIGHTS_FILE, os.mkfifo), f"{WEIGHTS_FILE} is not a regular file"),
    "a pipe as config": (in_place_of(CONFIG_FILE, os.mkfifo), f"{CONFIG_FILE} is not a regular file"),
    "a folder as weights": (in_place_of(WEIGHTS_FILE, Path.mkdir), f"{WEIGHTS_FILE} is not a regular file"),
    "a device as weights": (
        in_place_of(WEIGHTS_FILE, lambda p: p.symlink_to("/dev/zero")), f"{WEIGHTS_FILE} is not a regular file",
    ),
    "a link to a text": (
        in_place_of(WEIGHTS_FILE, lambda p: p.symlink_to("/etc/passwd")), f"{WEIGHTS_FILE} is not a valid safetensors",
    ),
    "a link to nowhere": (in_place_of(WEIGHTS_FILE, lambda p: p.symlink_to("nowhere")), f"no {WEIGHTS_FILE} in"),
}  # fmt: skip
