r"""Formulas of docstrings, which are plain text there, as LaTeX.

    L = E_q[log p(x | z)] - sum_z beta_z KL(q(z | x) || p(z))

is read as a mathematician would: Greek names are letters, ``sum_z`` is a sum, ``w_nk`` has two
indices, ``x^(1 - b)`` an exponent, and words that are no names are words.
"""

import re

_GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "eta", "theta", "lambda", "mu"),
    *("pi", "rho", "sigma", "tau", "phi", "psi", "omega"),
}
_FUNCTIONS = {"log": r"\log", "exp": r"\exp", "max": r"\max", "min": r"\min", "tr": r"\mathrm{tr}"}
_OPERATORS = {"sum": r"\sum", "grad": r"\nabla", "propto": r"\propto"}
_UPRIGHT = {"KL", "TC"}
_LETTERS = {"E": r"\mathbb{E}", "L": r"\mathcal{L}"}
_SYMBOLS = {
    "||": r"\,\Vert\,",
    "|": r"\mid ",
    "...": r"\dots ",
    "<=": r"\le ",
    ">=": r"\ge ",
    "~": r"\sim ",
    "*": r"\ast ",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "&": r"\&",
}
_SIZE = re.compile(r"\|(\S(?:[^|]*[^|\s])?)\|")  # |KL / N - C|
_NAME = r"[a-z]{2,}(?:_[a-z]{2,})+"  # num_steps
_TOKEN = re.compile(
    r"\\(?P<macro>[a-zA-Z]+)"
    rf"|(?P<name>\b{_NAME}\b)"
    r"|(?P<base>[A-Za-z]+|\d+(?:[.,]\d+)*|[)\]])"
    r"(?:_(?P<sub>\{[^}]*\}|[A-Za-z0-9]+(?::[A-Za-z0-9]+(?:-\d+)?)?))?"
    r"(?:\^(?P<sup>\([^()]*\)|\{[^}]*\}|-?[A-Za-z0-9]+))?"
    r"|(?P<symbol>\|\||\.\.\.|<=|>=|.)",
    re.DOTALL,
)


def latex(formula: str) -> str:
    """One line of a formula."""
    parts: list[str] = []
    for match in _TOKEN.finditer(_SIZE.sub(r"\\lvert \1\\rvert ", formula)):
        macro, name, base, symbol = match["macro"], match["name"], match["base"], match["symbol"]
        if macro:
            parts.append(f"\\{macro} ")
        elif name and not set(name.split("_")) & {*_GREEK, *_OPERATORS}:
            parts.append(r"\mathtt{" + name.replace("_", r"\_") + "}")
        elif name:
            base, _, sub = name.partition("_")
            parts.append(_scripts(_base(base), sub, None))
        elif base:
            parts.append(_scripts(_base(base), match["sub"], match["sup"]))
        elif symbol.isspace():
            parts.append(" ")
        else:
            parts.append(_SYMBOLS.get(symbol, symbol))
    return _joined("".join(parts))


def _base(word: str) -> str:
    if word in _GREEK:
        return f"\\{word} "
    known = _FUNCTIONS.get(word) or _OPERATORS.get(word) or _LETTERS.get(word)
    if known:
        return known + " "
    if word in _UPRIGHT:
        return rf"\mathrm{{{word}}}"
    if word.isalpha() and len(word) == 2 and word[0] == "d":
        return f"d{word[1]}"
    if word.isalpha() and len(word) > 1:
        return rf"\text{{{word}}}"
    return word


def _scripts(base: str, sub: str | None, sup: str | None) -> str:
    found = base
    if sub:
        found = found.rstrip() + "_{" + _index(sub.strip("{}")) + "}"
    if sup:
        found = found.rstrip() + "^{" + latex(sup.strip("(){}")) + "}"
    return found


def _index(sub: str) -> str:
    """``nk`` are two indices, ``lambda`` is one."""
    if sub.isalpha() and sub not in _GREEK and len(sub) <= 2:
        return sub
    return latex(sub)


def _joined(text: str) -> str:
    """Words that follow each other as one text, with the spaces between them."""
    word = r"\\text\{([^}]*)\}"
    while (joined := re.sub(rf"{word} +{word}", r"\\text{\1 \2}", text)) != text:
        text = joined
    return re.sub(rf" {word} ", r" \\text{ \1 } ", f" {text} ").strip()
