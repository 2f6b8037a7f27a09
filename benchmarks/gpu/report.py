"""`report`: what `results.json` holds, as text that can be read in a terminal."""

from __future__ import annotations

from typing import Any


def report(results: dict[str, Any]) -> str:
    """A section per stage and a line per figure, including those that failed or were skipped."""
    lines = []
    for name, stage in results["stages"].items():
        lines += [f"## {name}: {stage['status']} ({stage.get('seconds', 0):.0f} s)", ""]
        lines += [f"- {figure}: {_line(value)}" for figure, value in stage.get("figures", {}).items()]
        lines += [f"- {figure}: FAILED: {reason}" for figure, reason in stage.get("errors", {}).items()]
        lines += [f"- {figure}: skipped, {reason}" for figure, reason in stage.get("skipped", {}).items()]
        if "last_output" in stage:
            lines += ["", "```", stage["last_output"].strip(), "```"]
        lines.append("")
    if "seconds" in results:
        lines.append(f"{results['seconds']:.0f} s in all.")
    return "\n".join(lines) + "\n"


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
