"""Finds sums over lanes whose bits may differ from lane to lane, in the text of a kernel's PTX."""

import re

_INSTRUCTION = re.compile(r"(?:^|;)\s*(?:@!?%p\d+\s+)?([a-z][\w.:]+)\s+([^;]*)(?=;)", re.M)
_OPERAND = re.compile(r"%\w+|0[fd][0-9a-fA-F]+")
_MOVES = ("mov", "cvt.u64.u32", "shl.b64", "or.b64", "prmt")  # of which a float64 is put together, too


def uneven_sums(ptx: str) -> list[str]:
    """Returns the instructions that add a product to the neighbouring lane's where the two are rounded differently.

    In p = a b, q = p of another lane, s = fma(a, b, q) the lane's own product is exact and the neighbour's is not: the
    two lanes hold different sums. ptxas may make the same of p + q where p is a plain product.
    """
    factors: dict[str, list[str]] = {}  # of each product
    here: dict[str, set[str]] = {}  # products that a register has been made of by moves alone
    there: dict[str, set[str]] = {}  # the same, of another lane
    found = []
    for op, text in _INSTRUCTION.findall(ptx):
        operands = _OPERAND.findall(text)
        if not operands:
            continue
        name, *parts = op.split(".")
        target, *sources = operands
        if name == "mul" and parts[-1].startswith("f"):
            factors[target], here[target], there[target] = sorted(sources), {target}, set()
            continue
        if name == "mov" and text.lstrip().startswith("{"):  # one register comes apart
            *targets, source = operands
        elif name == "shfl":
            here[target], there[target] = set(), here.get(sources[0], set()) | there.get(sources[0], set())
            continue
        elif op.startswith(_MOVES):
            targets, source = [target], None
        else:
            *factor, term = sources or [""]
            products = there.get(term, set())
            if name == "fma" and any(factors[p] == sorted(factor) for p in products):
                found.append(f"{op} {text}")
            if name == "add" and "rn" not in parts and len(sources) == 2:
                a, b = sources
                if (a in factors and a in there.get(b, ())) or (b in factors and b in there.get(a, ())):
                    found.append(f"{op} {text}")
            here[target], there[target] = set(), set()
            continue
        given = sources if source is None else [source]
        for one in targets:
            here[one] = set().union(*(here.get(x, set()) for x in given))
            there[one] = set().union(*(there.get(x, set()) for x in given))
    return found
