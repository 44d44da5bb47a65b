"""Generated safetensors files that are malformed, or odd but accepted. ``cases()`` gives each with
the ``FormatError.code`` that it must raise, or ``"ok"``.
"""

from __future__ import annotations

import json
import struct
from typing import NamedTuple

OK = "ok"
# One of two tensors would be silently lost; the format forbids it, the reference accepts it.
DUPLICATE = "duplicate_name"

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


class Case(NamedTuple):
    name: str
    data: bytes
    expected: str


def build(header: str | bytes, data: int | bytes = 4, length: int | None = None) -> bytes:
    """A file with this header and this data, or this number of data bytes."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    body = data if isinstance(data, bytes) else bytes(1 + i % 127 for i in range(data))
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**tensors: object) -> str:
    return json.dumps(tensors, separators=(",", ":"))


def field(name: str, value: str) -> str:
    """The header of one tensor of four bytes, the JSON of one field replaced."""
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | {name: value}
    return '{"a":{' + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}}"


def extra(value: str) -> str:
    return field("extra", value)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def small_file() -> bytes:
    """A file that is small enough to change every bit, with most constructs of a header.

    The names "a" and "c" are one bit apart, so that one of the changes makes them the same.
    """
    text = (
        '{"__metadata__":{"k":"\\u00e9"},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},'
        '"c":{"dtype":"U8","shape":[],"data_offsets":[4,5],"x":[{"y":null},-1.5]},'
        '"\u00e9":["I16",[0,3],[5,5]],"f":[{"F32":null},[1],[5,9]]}'
    )
    return build(text, 9)


def _starts() -> list[Case]:
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    return [
        Case("empty_file", b"", "empty_file"),
        Case("lfs_pointer", pointer, "git_lfs_pointer"),
        Case("web_page", b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "not_weights"),
        Case("web_page_after_space", b"\r\n\t <HTML><body></body></HTML>", "not_weights"),
        Case("xml_error", b'<?xml version="1.0"?><Error>AccessDenied</Error>', "not_weights"),
        Case("short_web_page", b"<html>", "not_weights"),
        Case("zip", b"PK\x03\x04\x00\x00\x08\x08" + bytes(64), "not_weights"),
        Case("one_byte", b"\x02", "header_too_small"),
        Case("seven_bytes", bytes(7), "header_too_small"),
        Case("length_zero", build("", 0), "header_too_small"),
        Case("length_zero_and_data", build("", 16), "header_too_small"),
        Case("length_one", build("{", 8), "header_too_small"),
        Case("length_over_limit", build("{}", 0, 100_000_001), "header_too_large"),
        Case("length_most", build("{}", 0, 2**64 - 1), "header_too_large"),
        Case("length_wraps", build("{}", 0, 2**64 - 8), "header_too_large"),
        Case("length_big_endian", struct.pack(">Q", 2) + b"{}", "header_too_large"),
        Case("length_past_end_by_one", build("{}", 0, 3), "header_past_end"),
        Case("length_at_limit_past_end", build("{}", 0, 100_000_000), "header_past_end"),
        Case("length_alone", struct.pack("<Q", 2), "header_past_end"),
    ]


def _texts() -> list[Case]:
    bad_utf8 = {
        "byte_ff": b"\xff",
        "continuation_alone": b"\x80",
        "cut_short": b"\xe2\x82",
        "overlong_nul": b"\xc0\x80",
        "overlong_three": b"\xe0\x80\x80",
        "surrogate": b"\xed\xa0\x80",
        "past_unicode": b"\xf4\x90\x80\x80",
        "five_bytes": b"\xf8\x88\x80\x80\x80",
    }
    entry = ENTRY.encode()
    bad_json = {
        "spaces_alone": "    ",
        "cut": '{"a":{"dtype":"F32"',
        "second_value": '{"a":' + ENTRY + "}{}",
        "trailing_word": '{"a":' + ENTRY + "}x",
        "trailing_nul": '{"a":' + ENTRY + "}\0",
        "leading_nul": '\0{"a":' + ENTRY + "}",
        "nul_between": '{"a":\0' + ENTRY + "}",
        "byte_order_mark": '\ufeff{"a":' + ENTRY + "}",
        "form_feed": '\f{"a":' + ENTRY + "}",
        "no_break_space": '{"a":' + ENTRY + "}\u00a0",
        "trailing_comma": '{"a":' + ENTRY + ",}",
        "no_comma": '{"a":' + ENTRY + ' "b":' + ENTRY + "}",
        "no_colon": '{"a" ' + ENTRY + "}",
        "bare_name": "{a:" + ENTRY + "}",
        "single_quotes": "{'a':" + ENTRY + "}",
        "comment": '{"a":/**/' + ENTRY + "}",
        "line_comment": "// weights\n" + '{"a":' + ENTRY + "}",
        "line_break_in_name": '{"a\n":' + ENTRY + "}",
        "shape_leading_zero": field("shape", "[01]"),
        "shape_plus": field("shape", "[+1]"),
        "shape_hexadecimal": field("shape", "[0x1]"),
        "extra_nan": extra("NaN"),
        "extra_infinity": extra("-Infinity"),
        "extra_past_double": extra("1e309"),
        "extra_long_past_double": extra("1" * 310),
        "extra_lone_high_surrogate": extra('"\\ud800"'),
        "extra_lone_low_surrogate": extra('"\\udc00"'),
        "extra_two_high_surrogates": extra('"\\ud800\\ud800"'),
        "extra_bad_escape": extra('"\\x41"'),
        "extra_short_escape": extra('"\\u12"'),
        "extra_array_comma": extra("[1,]"),
    }
    not_objects = {"list": "[]", "list_of_two": "[null,{}]", "null": "null", "number": "17"}
    return [
        *(
            Case(f"utf8_{name}", build(b'{"' + text + b'":' + entry + b"}"), "header_not_utf8")
            for name, text in bad_utf8.items()
        ),
        *(Case(f"json_{name}", build(text), "header_not_json") for name, text in bad_json.items()),
        *(Case(f"top_{name}", build(t, 0), "header_not_object") for name, t in not_objects.items()),
        Case("deep_extra", build(extra(nested(126))), "header_too_deep"),
        Case("deep_objects", build(extra('{"q":' * 126 + "1" + "}" * 126)), "header_too_deep"),
        Case("very_deep", build(extra(nested(200_000))), "header_too_deep"),
    ]


def _metadata() -> list[Case]:
    bad = {
        "list": "[]",
        "string": '"pt"',
        "number_value": '{"k":1}',
        "null_value": '{"k":null}',
        "object_value": '{"k":{}}',
        "is_a_tensor": ENTRY,
    }
    return [
        *(
            Case(f"metadata_{name}", build('{"__metadata__":' + value + "}", 0), "metadata_invalid")
            for name, value in bad.items()
        ),
        *(
            Case(
                f"metadata_twice_{name}",
                build('{"__metadata__":' + value + ',"__metadata__":{}}', 0),
                "metadata_invalid",
            )
            for name, value in {"object": "{}", "null": "null"}.items()
        ),
    ]


def _entries() -> list[Case]:
    bad_entries = {
        "null": "null",
        "number": "1",
        "string": '"F32"',
        "empty": "{}",
        "no_dtype": '{"shape":[1],"data_offsets":[0,4]}',
        "no_shape": '{"dtype":"F32","data_offsets":[0,4]}',
        "no_offsets": '{"dtype":"F32","shape":[1]}',
        "dtype_twice": '{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        "offsets_twice": '{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}',
        "list_of_two": '["F32",[1]]',
        "list_of_four": '["F32",[1],[0,4],0]',
    }
    bad_fields = [
        ("dtype", "null", "null"),
        ("dtype", "number", "13"),
        ("dtype", "list", '["F32"]'),
        ("dtype", "empty_object", "{}"),
        ("dtype", "object_with_object", '{"F32":{}}'),
        ("dtype", "object_of_two", '{"F32":null,"F16":null}'),
        ("shape", "null", "null"),
        ("shape", "number", "1"),
        ("shape", "object", '{"0":1}'),
        ("shape", "negative", "[-1]"),
        ("shape", "minus_zero", "[-0]"),
        ("shape", "fraction", "[1.0]"),
        ("shape", "exponent", "[1e0]"),
        ("shape", "past_64_bits", "[18446744073709551616]"),
        ("shape", "string", '["1"]'),
        ("shape", "nested", "[[1]]"),
        ("shape", "boolean", "[true]"),
        ("data_offsets", "null", "null"),
        ("data_offsets", "object", '{"0":0,"1":4}'),
        ("data_offsets", "none", "[]"),
        ("data_offsets", "one", "[4]"),
        ("data_offsets", "three", "[0,4,4]"),
        ("data_offsets", "negative", "[-4,4]"),
        ("data_offsets", "minus_zero", "[-0,4]"),
        ("data_offsets", "fraction", "[0,4.0]"),
        ("data_offsets", "string", '[0,"4"]'),
    ]
    dtypes = ["F128", "f32", "", "F32 ", "C32", "C128", "float32"]
    two = '{"a":' + ENTRY + ',"%s":{"dtype":"F32","shape":[1],"data_offsets":%s}}'
    return [
        *(
            Case(f"entry_{name}", build('{"a":' + entry + "}"), "tensor_invalid")
            for name, entry in bad_entries.items()
        ),
        *(
            Case(f"{key}_{name}", build(field(key, value)), "tensor_invalid")
            for key, name, value in bad_fields
        ),
        *(
            Case(f"unknown_dtype_{i}", build(field("dtype", json.dumps(dtype))), "unknown_dtype")
            for i, dtype in enumerate(dtypes)
        ),
        Case("duplicate_same_place", build(two % ("a", "[0,4]")), DUPLICATE),
        Case("duplicate_escaped", build(two % ("\\u0061", "[0,4]")), DUPLICATE),
        Case(
            "duplicate_last_one_whole",
            build('{"a":{"dtype":"F32","shape":[9],"data_offsets":[7,9]},"a":' + ENTRY + "}"),
            DUPLICATE,
        ),
    ]


def _sizes() -> list[Case]:
    overflows = {
        "before_zero": "[9223372036854775808,4,0]",
        "product": "[4294967296,4294967296]",
        "wraps_to_eight": "[4611686018427387906]",
        "most": "[18446744073709551615]",
        "bits_alone": "[576460752303423488]",
    }
    two = '{"a":' + ENTRY + ',"b":{"dtype":"F32","shape":[1],"data_offsets":%s}}'
    offsets = {"first_not_zero": "[1,5]", "end_before_begin": "[4,0]", "far": "[8,12]"}
    one = header(a=tensor())
    huge = header(a=tensor("U8", [2**61 - 1], [0, 2**61 - 1]))
    return [
        *(
            Case(f"shape_overflow_{name}", build(field("shape", shape)), "shape_overflow")
            for name, shape in overflows.items()
        ),
        Case("f4_odd", build(header(a=tensor("F4", [7]))), "sub_byte_misaligned"),
        Case("f6_five", build(header(a=tensor("F6_E2M3", [5]))), "sub_byte_misaligned"),
        Case("shape_too_large", build(header(a=tensor(shape=[2]))), "size_mismatch"),
        Case("shape_too_small", build(header(a=tensor(shape=[0]))), "size_mismatch"),
        Case("dtype_too_small", build(header(a=tensor("F16"))), "size_mismatch"),
        Case("offsets_most", build(field("data_offsets", f"[0,{2**64 - 1}]")), "size_mismatch"),
        *(
            Case(f"offsets_{name}", build(field("data_offsets", value)), "offsets_invalid")
            for name, value in offsets.items()
        ),
        Case("offsets_hole", build(two % "[8,12]", 12), "offsets_invalid"),
        Case("offsets_overlap", build(two % "[2,6]", 6), "offsets_invalid"),
        Case("offsets_shared", build(two % "[0,4]", 4), "offsets_invalid"),
        Case("offsets_inside", build(two % "[1,3]", 4), "offsets_invalid"),
        Case("data_none", build(one, 0), "data_incomplete"),
        Case("data_one_short", build(one, 3), "data_incomplete"),
        Case("data_exbibytes_short", build(huge, 4), "data_incomplete"),
        Case("data_one_over", build(one, 5), "trailing_bytes"),
        Case("data_without_tensors", build("{}", 1), "trailing_bytes"),
        Case("data_of_two_files", build(one, 4) * 2, "trailing_bytes"),
    ]


def _accepted() -> list[Case]:
    one = '{"a":' + ENTRY + "}"
    # torch has a dtype for each of these, but not for F6_E2M3 and F6_E3M2.
    bits = {
        "BOOL": 8, "F4": 4, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    }  # fmt: skip
    ties = {
        "z": tensor("U8", [2], [3, 5]),
        "n2": tensor("U8", [0], [3, 3]),
        "scalar": tensor("U8", [], [2, 3]),
        "n1": tensor("F32", [4, 0], [3, 3]),
        "last": tensor("U8", [0], [5, 5]),
        "first": tensor("U8", [0], [0, 0]),
        "a": tensor("BF16", [1], [0, 2]),
    }
    names = ["", "\0", "../x", "/etc/passwd", "a b", '"\\\n', "\u00e9", "\U0001f600", "\uffff"]
    named = {name: tensor("U8", [1], [i, i + 1]) for i, name in enumerate(names)}
    headers: dict[str, tuple[str, int]] = {
        "no_tensors": ("{}", 0),
        "no_tensors_and_spaces": (" \t\r\n{ } \n", 0),
        "leading_space": (" \t\r\n" + one, 4),
        "trailing_space": (one + " \t\r\n", 4),
        "odd_length": (one + " " * (1 - len(one) % 2), 4),
        "metadata_only": ('{"__metadata__":{"k":"v"}}', 0),
        "metadata_empty": ('{"__metadata__":{}}', 0),
        "metadata_null": ('{"__metadata__":null,"a":' + ENTRY + "}", 4),
        "metadata_key_twice": ('{"__metadata__":{"k":"1","k":"2"},"a":' + ENTRY + "}", 4),
        "metadata_last": ('{"a":' + ENTRY + ',"__metadata__":{"k":"v"}}', 4),
        "metadata_escaped": ('{"\\u005f_metadata__":{"k":"v"},"a":' + ENTRY + "}", 4),
        "entry_a_list": ('{"a":["F32",[1],[0,4]]}', 4),
        "entry_a_list_with_object": ('{"a":[{"F32":null},[1],[0,4]]}', 4),
        "dtype_an_object": (field("dtype", '{"F32":null}'), 4),
        "dtype_escaped": (field("dtype", '"\\u00463\\u0032"'), 4),
        "field_escaped": (one.replace("dtype", "\\u0064type"), 4),
        "fields_reversed": ('{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}', 4),
        "extra_twice": (one.replace('"shape"', '"x":1,"x":{"dtype":[2]},"shape"'), 4),
        "extra_minus_zero": (extra("-0"), 4),
        "extra_past_64_bits": (extra("18446744073709551616"), 4),
        "extra_largest_double": (extra("1.7976931348623157e308"), 4),
        "extra_zero_exponent": (extra("0e999"), 4),
        "extra_surrogates": (extra('"\\ud83d\\ude00"'), 4),
        "extra_delete_character": (extra('"\x7f"'), 4),
        "extra_deepest": (extra(nested(125)), 4),
        "scalar": (field("shape", "[]"), 4),
        "rank_60": (field("shape", "[" + "1," * 59 + "1]"), 4),
        "zero_size": (header(a=tensor(shape=[3, 0, 2], offsets=[0, 0])), 0),
        "unordered_with_ties": (header(**ties), 5),
        "odd_names": (json.dumps(named), len(names)),
        "odd_names_escaped_not": (json.dumps(named, ensure_ascii=False), len(names)),
        "misaligned_data": (header(b=tensor("U8", [1], [0, 1]), a=tensor("F64", [1], [1, 9])), 9),
    }
    return [
        *(Case(f"ok_{name}", build(text, data), OK) for name, (text, data) in headers.items()),
        *(
            Case(
                f"ok_dtype_{dtype}",
                build(header(a=tensor(dtype, [2, 4], [0, width])), bytes([0, 1] * (width // 2))),
                OK,
            )
            for dtype, width in bits.items()
        ),
    ]


def cases() -> list[Case]:
    found = [*_starts(), *_texts(), *_metadata(), *_entries(), *_sizes(), *_accepted()]
    assert len({case.name for case in found}) == len(found)
    return found
