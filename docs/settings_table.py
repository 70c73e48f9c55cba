"""Writes the tables of configuration.md from pie_vllm.config: ``python -m docs.settings_table``."""

from __future__ import annotations

from pathlib import Path

from pie_vllm.config import SETTINGS, Setting

PAGE = Path(__file__).with_name("configuration.md")
BEGIN = "<!-- Made by `python -m docs.settings_table` from pie_vllm/config.py. -->"
END = "<!-- End of what is made. -->"


def tables() -> str:
    """A heading and a table for each section of the settings, as Markdown."""
    sections = dict.fromkeys(setting.section for setting in SETTINGS)
    return "\n\n".join(
        _table(section, [s for s in SETTINGS if s.section == section]) for section in sections
    )


def page(text: str) -> str:
    """The page with the tables of today between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE.name} has lost its markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _table(section: str, settings: list[Setting]) -> str:
    """One section; its flags have a column where there are any."""
    flags = {s.name: _flag(s) for s in settings}
    heads = ["key", *(["flag"] if any(flags.values()) else []), "value", "default", "meaning"]
    lines = [f"## {section}", "", _row(heads), _row(["---"] * len(heads))]
    for s in settings:
        flag = [flags[s.name]] if "flag" in heads else []
        default = s.default_text if s.unset else f"`{s.default_text}`"
        lines.append(_row([f"`{s.name}`", *flag, s.values.wanted, default, s.help]))
    return "\n".join(lines)


def _flag(setting: Setting) -> str:
    if setting.old_flag:
        return f"`{setting.old_flag}`, deprecated"
    if setting.flag is None:
        return ""
    is_switch = setting.values.metavar is None
    return f"`{setting.flag}`{f', `--no-{setting.flag[2:]}`' if is_switch else ''}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
