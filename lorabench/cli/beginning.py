"""The verb that writes first configs for a data file: init."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.cli.telling import Parser
from lorabench.cli.verbs import VERBS
from lorabench.cli.words import conf_folder

if TYPE_CHECKING:
    from lorabench.data.sources.look import Seen

FOLDER = Path("conf")  # of the working directory, where Hydra finds presets of one's own


def init(arguments: list[str]) -> int:
    """lorabench init FILE [--name NAME] [--force]"""
    parser = Parser(
        prog="lorabench init",
        description=VERBS["init"],
        epilog="writes conf/data/NAME.yaml and conf/experiment/NAME.yaml below this folder, where "
        "every command run in it finds them",
    )
    parser.add_argument(
        "file", metavar="FILE", help="a data file, a folder of them, or a glob in quotes"
    )
    parser.add_argument("--name", help="of the configs; default: the file's")
    parser.add_argument("--force", action="store_true", help="replace the two files")
    options = parser.parse_args(arguments)

    from lorabench import drafts
    from lorabench.config import ConfigErrors
    from lorabench.files import obstacle, write_atomic

    name = options.name or drafts.name_of(options.file)
    places = {kind: FOLDER / kind / f"{name}.yaml" for kind in ("data", "experiment")}
    errors = _wrong_names(name, places, options.force)
    errors += [
        f"conf: must be a folder to write to; '{found[0]}' {found[1]}; use another working "
        f"directory"
        for found in [obstacle(FOLDER)]
        if found is not None
    ]
    if errors:
        raise ConfigErrors(errors)
    seen = _seen(options.file)
    draft = drafts.read(seen)
    path = _path(options.file)
    write_atomic(places["data"], drafts.data_config(seen, draft, path, name))
    write_atomic(places["experiment"], drafts.experiment_config(path, name))
    rows = f"{seen.num_rows:,} row{'s' if seen.num_rows != 1 else ''}"
    told = ", ".join(f"{key} from {value!r}" for key, value in draft.columns.items())
    print(f"read     {path}: {seen.kind}, {rows}, columns {', '.join(seen.columns)}")
    print(f"taken    for data.format={draft.format}: {told}")
    for place in places.values():
        print(f"written  {place}")
    print(f"next     lorabench plan -m experiment={name} model=ORG/NAME")
    return 0


def _wrong_names(name: str, places: dict[str, Path], force: bool) -> list[str]:
    """What is wrong with the name of the configs, or with the places that it gives."""
    from lorabench.drafts import name_of

    if name != name_of(name):
        return [f"--name: must be letters, digits, _ and -; got '{name}'; use '{name_of(name)}'"]
    built_in = Path(conf_folder())
    if not FOLDER.is_dir() or not os.path.samefile(FOLDER, built_in):
        for kind in places:
            if (built_in / kind / f"{name}.yaml").is_file():
                return [
                    f"--name: must be another than those of lorabench's own presets; got '{name}', "
                    f"which {kind} has; use --name={name}_mine"
                ]
    there = [str(place) for place in places.values() if place.exists()]
    if there and not force:
        return [f"--name: must be new; {' and '.join(there)} exist; give --name or --force"]
    return []


def _seen(file: str) -> Seen:
    """What the file holds.

    Raises:
        ConfigErrors: It cannot be read, or has no row.
    """
    from lorabench.config import ConfigErrors
    from lorabench.data.readers import Refused
    from lorabench.data.sources.look import look

    try:
        seen = look(file)
    except Refused as error:
        raise ConfigErrors(error.line("FILE")) from error
    except OSError as error:
        raise ConfigErrors(
            f"FILE: must be readable; '{file}': {error.strerror}; correct its rights or the path"
        ) from error
    if not seen.num_rows:
        raise ConfigErrors(f"FILE: must have rows; '{file}' has none; write some into it")
    return seen


def _path(file: str) -> str:
    """The path for the config: relative where it lies below the working directory."""
    path = Path(file).expanduser()
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(path)
