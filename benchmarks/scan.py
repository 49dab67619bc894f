"""How the embedded question was chosen: regimes tried on validation, by the command line itself.

    python benchmarks/scan.py [--out outputs] [--only NAME]

A regime is stable when no setting's exact match is above 0.98 or below 0.02, and the largest
range over seeds within a setting is at most half of the range between the settings' means.
Results: benchmarks/results/scan.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorabench import provenance

ALL_RANKS = "16,32,64"
CORNERS = "16,64"
# name: skills, target_modules, lr, steps, ranks, seeds
REGIMES: dict[str, tuple[str, str, str, int, str, str]] = {
    "chosen": ("[sort_leet]", "attention", "1e-3", 300, ALL_RANKS, "0,1"),
    "chosen, other seeds": ("[sort_leet]", "attention", "1e-3", 300, ALL_RANKS, "2,3"),
    "twice the lr": ("[sort_leet]", "attention", "2e-3", 300, CORNERS, "0,1"),
    "fewer steps": ("[sort_leet]", "attention", "1e-3", 200, CORNERS, "0,1"),
    "all-linear": ("[sort_leet]", "all-linear", "1e-3", 300, CORNERS, "0,1"),
    "reversed, attention": ("[reverse_leet]", "attention", "1e-3", 300, CORNERS, "0,1"),
    "reversed, all-linear": ("[reverse_leet]", "all-linear", "1e-3", 200, ALL_RANKS, "0,1"),
    "leet": ("[leet]", "all-linear", "1e-3", 200, CORNERS, "0,1"),
    "keypad and sort_next": ("[keypad,sort_next]", "all-linear", "2e-3", 250, CORNERS, "2,3"),
    "greek": ("[greek]", "all-linear", "2e-3", 250, CORNERS, "0,1"),
    "cipher": ("[cipher]", "all-linear", "3e-3", 250, CORNERS, "0,1"),
    "sort_next": ("[sort_next]", "all-linear", "1e-3", 100, CORNERS, "0,1"),
}


def run(name: str, out: Path) -> dict[str, Any]:
    """Train a regime's grid and judge it on the validation split."""
    skills, targets, lr, steps, ranks, seeds = REGIMES[name]
    sweep = "scan_" + name.replace(" ", "_").replace(",", "")
    command = [
        sys.executable,
        "-m",
        "lorabench",
        "train",
        "-m",
        "head=exclude,lora",
        f"lora.r={ranks}",
        f"seed={seeds}",
        f"data.skills={skills}",
        f"target_modules={targets}",
        f"trainer.lr={lr}",
        f"trainer.steps={steps}",
        "tracker=none",
        "trainer.num_threads=1",
        f"output_dir={out}",
        f"sweep={sweep}",
    ]
    subprocess.run(command, check=True)
    compared = subprocess.run(
        [sys.executable, "-m", "lorabench", "compare", str(out / sweep), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = json.loads(compared.stdout)["rows"]
    found = [
        {
            **row["setting"],
            **{
                metric: {
                    k: round(v, 4)
                    for k, v in row["metrics"]["validation"][metric].items()
                    if v is not None
                }
                for metric in ("exact_match", "nll")
            },
        }
        for row in rows
    ]
    exact = [row["exact_match"] for row in found]
    between = max(e["mean"] for e in exact) - min(e["mean"] for e in exact)
    within = max(e["max"] - e["min"] for e in exact)
    inside = all(e["min"] >= 0.02 and e["max"] <= 0.98 for e in exact)
    return {
        "regime": name,
        "skills": skills,
        "target_modules": targets,
        "lr": float(lr),
        "steps": steps,
        "seeds": seeds,
        "settings": found,
        "range_between_settings": round(between, 4),
        "largest_range_over_seeds": round(within, 4),
        "inside_0.02_0.98": inside,
        "stable": bool(inside and within <= 0.5 * between),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--only", choices=REGIMES)
    options = parser.parse_args()
    results = []
    for name in [options.only] if options.only else REGIMES:
        results.append(run(name, options.out))
        print(json.dumps(results[-1]), flush=True)
    if options.only:
        return
    content = {
        "versions": provenance.versions(),
        "cpu": provenance.cpu_name(),
        "split": "validation",
        "command": "python benchmarks/scan.py",
        "regimes": results,
    }
    target = Path(__file__).parent / "results" / "scan.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
