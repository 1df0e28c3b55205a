"""Source pass from the Metal shading language to C++ for the shim.

Types, qualifiers and functions are handled by ``shim/metal_stdlib``; what C++ has no spelling for is rewritten here:

- attributes of kernel parameters become wrapper types, unwrapped at the start of the body;
- function constants become settable statics; ``[[host_name]]`` instantiations and plain kernels enter a registry;
- literals of type half; arrays in threadgroup memory become statics (the executor runs one threadgroup at a time).

Line numbers are kept, so the executor's messages name lines of the Metal source.
"""

from __future__ import annotations

import re
from collections.abc import Collection

ATTRIBUTES = {
    "threadgroup_position_in_grid": "threadgroup_position_in_grid",
    "thread_position_in_threadgroup": "thread_position_in_threadgroup",
    "thread_index_in_threadgroup": "thread_index_in_threadgroup",
    "thread_index_in_simdgroup": "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup": "simdgroup_index_in_threadgroup",
    "threads_per_threadgroup": "threads_per_threadgroup_",
    "threadgroups_per_grid": "threadgroups_per_grid_",
    "threads_per_simdgroup": "threads_per_simdgroup",
    "simdgroups_per_threadgroup": "simdgroups_per_threadgroup",
}


class TranslationError(ValueError):
    """The source holds a construct that the pass does not know."""


def without_comments(text: str) -> str:
    """The text with comments blanked out, lines kept."""
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|/\*.*?\*/|//[^\n]*', re.DOTALL)
    return pattern.sub(lambda m: m[0] if m[0].startswith('"') else re.sub(r"[^\n]", " ", m[0]), text)


def balanced(text: str, start: int, pair: str = "()") -> int:
    """Index just past the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i + 1
    raise TranslationError(f"no closing {pair[1]!r} after {text[start : start + 40]!r}")


def split_parameters(text: str) -> list[str]:
    """Parameters of a list, split at commas outside of brackets."""
    parts, depth, at = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([<") - (c in ")]>")
        if c == "," and depth == 0:
            parts.append(text[at:i])
            at = i + 1
    return [*parts, text[at:]]


def _parameter(text: str) -> tuple[str, str]:
    """One kernel parameter in C++ and the declaration that unwraps it in the body."""
    attribute = re.search(r"\[\[\s*(\w+)(?:\((\d+)\))?\s*\]\]", text)
    if not attribute:
        return text, ""
    name, number = attribute[1], attribute[2]
    bare = text[: attribute.start()] + text[attribute.end() :]
    if name == "buffer":
        raise TranslationError("buffers are bound in order: [[buffer(n)]] is not handled")
    words = re.match(r"(\s*)(?:threadgroup\s+)?([\w:]+)\s*(\*?)\s*(\w+)\s*$", bare)
    if not words:
        raise TranslationError(f"parameter {text.strip()!r}")
    space, kind, star, variable = words.groups()
    if name == "threadgroup" and star:
        wrapped = f"shim::from_threadgroup<{kind}, {number}>"
        return f"{space}{wrapped} {variable}_arg", f" {kind} * {variable} = {variable}_arg.value;"
    if name not in ATTRIBUTES or star:
        raise TranslationError(f"attribute {name}")
    wrapped = f"shim::from_attribute<{kind}, shim::{ATTRIBUTES[name]}>"
    return (
        f"{space}{wrapped} {variable}_arg",
        f" const {kind} {variable} = {variable}_arg.value; (void) {variable};",
    )


def kernel_names(text: str) -> list[str]:
    """All names under which kernels of a Metal source can be found."""
    text = without_comments(text)
    named = re.findall(r'\[\[host_name\("([^"]+)"\)\]\]', text)
    plain = [
        m[1] for m in re.finditer(r"\bkernel\s+void\s+(\w+)\s*\(", text) if not _is_template(text, m.start())
    ]
    return named + plain


def _is_template(text: str, kernel_at: int) -> bool:
    return re.search(r"template\s*<(?:[^<>;{}]|<[^<>]*>|\([^()]*\))*>\s*$", text[:kernel_at]) is not None


def translate(text: str, keep: Collection[str] | None = None) -> str:
    """C++ for ``shim/metal_stdlib``; with ``keep`` only those kernels (by host name) and what they need."""
    text = without_comments(text)

    instances: dict[str, list[str]] = {}
    for host, body in re.findall(r'template\s*\[\[host_name\("([^"]+)"\)\]\]\s*kernel\s+([^;]+);', text):
        if keep is None or host in keep:
            function = re.search(r"\b(\w+)\s*<", body)
            if function is None:
                raise TranslationError(f"instantiation of {host}")
            instances.setdefault(function[1], []).append(host)

    out: list[str] = []
    at = 0
    registered: list[str] = []
    for kernel in re.finditer(r"\bkernel\s+void\s+(\w+)\s*\(", text):
        if kernel.start() < at:
            continue
        template = _is_template(text, kernel.start())
        end_of_parameters = balanced(text, kernel.end() - 1)
        body = text.index("{", end_of_parameters)
        end = balanced(text, body, "{}")
        wanted = keep is None or (kernel[1] in instances if template else kernel[1] in keep)
        if not wanted:
            begin = text.rindex("template", 0, kernel.start()) if template else kernel.start()
            out.append(text[at:begin] + "\n" * text[begin:end].count("\n"))
            at = end
            continue
        pairs = [_parameter(p) for p in split_parameters(text[kernel.end() : end_of_parameters - 1])]
        parameters, unwrap = ",".join(p for p, _ in pairs), "".join(u for _, u in pairs)
        out.append(
            text[at : kernel.start()]
            + f"static void {kernel[1]}("
            + parameters
            + ")"
            + text[end_of_parameters : body + 1]
        )
        out.append(unwrap + text[body + 1 : end])
        if not template:
            registered.append(f'static shim::kernel_entry entry_{kernel[1]}("{kernel[1]}", &{kernel[1]});')
        at = end
    text = "".join(out) + text[at:]

    count = 0

    def instance(m: re.Match[str]) -> str:
        nonlocal count
        host, rest = m[1], m[2]
        lines = "\n" * m[0].count("\n")
        if keep is not None and host not in keep:
            return lines
        function = re.search(r"(\w+\s*<.*>)\s*$", rest.strip().partition(" ")[2] or rest, re.DOTALL)
        if function is None:
            raise TranslationError(f"instantiation of {host}")
        count += 1
        return (
            f'static shim::kernel_entry instance_{count}("{host}", &{" ".join(function[1].split())});{lines}'
        )

    text = re.sub(r'template\s*\[\[host_name\("([^"]+)"\)\]\]\s*kernel\s+([^;]+);', instance, text)
    if keep is not None:  # names of removed templates
        text = re.sub(
            r"typedef\s+decltype\((\w+)<[^;]*;",
            lambda m: m[0] if m[1] in instances else "\n" * m[0].count("\n"),
            text,
        )
    text = re.sub(
        r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[function_constant\(([^\]]*)\)\]\]\s*;",
        r"static \1 \2; static shim::function_constant constant_\2((int) (\3), &\2);",
        text,
    )
    text = re.sub(
        r"(?m)^(\s+)threadgroup\s+([\w:<>, ]+?)\s+(\w+)((?:\s*\[[^\]]+\])+)\s*;", r"\1static \2 \3\4;", text
    )
    text = re.sub(r"\b(?:const\s+constant|constant\s+const)\b", "const", text)  # C++ wants one const
    text = re.sub(r"(?<![\w.])(\d+\.\d*|\.\d+)(e[-+]?\d+)?h\b", r"half(\1\2f)", text)
    text = re.sub(r"\[\[\s*max_total_threads_per_threadgroup\([^)]*\)\s*\]\]", "", text)
    return text + "\n" + "\n".join(registered) + "\n"


def for_address_spaces(text: str) -> str:
    """The source for clang's C++ for OpenCL (``shim/address_spaces.h``): attributes go, function constants get a value."""
    text = without_comments(text).replace("#include <metal_stdlib>", "")
    text = re.sub(r"(\bconstant\s+\w+\s+\w+)\s*\[\[function_constant\([^\]]*\)\]\]\s*;", r"\1 = 1;", text)
    return re.sub(r"\[\[[^\]]*\]\]", "", text)
