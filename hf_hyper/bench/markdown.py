"""Tables in Markdown."""

__all__ = ["table"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of a table, without a final newline.

    Example:
        >>> print(table(["a"], [["1"]]))
        | a |
        | --- |
        | 1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
