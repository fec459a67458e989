"""Do the tests have teeth? Applies deliberate breaks, one at a time, and expects tests to fail.

    python -m tests.mutants                  all of them
    python -m tests.mutants wino_limit eos   some
    python -m tests.mutants --jobs=8         more of them at a time

Each break is a patch beside this file; its first lines say what it is about and which tests are to
catch it, the narrowest that do, among them one that runs every fourth day at least. Every one is
applied to a copy of the working tree. What is not caught, or does not apply any more, is listed,
and the command fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FAILED = 1  # pytest's exit status if tests ran and some failed
PATIENCE = 120.0  # seconds that tests may take
SLOWEST = 5  # breaks named at the end


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A deliberate break.

    Attributes:
      file: the patch.
      about: what is broken, in words.
      tests: what pytest is given: paths or ids of tests.
    """

    file: pathlib.Path
    about: str
    tests: tuple[str, ...]


def read(file: pathlib.Path) -> Mutant:
    """A patch with its header."""
    header = dict(line.split(": ", 1) for line in file.read_text().split("\n\n")[0].splitlines())
    return Mutant(file, header["about"], tuple(shlex.split(header["tests"])))


def copy_tree(target: pathlib.Path) -> None:
    """The working tree as git sees it, without what it ignores."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def verdict(mutant: Mutant, tree: pathlib.Path, environment: dict[str, str]) -> str:
    """ "" if tests fail with the break in `tree`, which is mended again; else what went wrong."""
    apply = ["git", "apply", str(mutant.file)]
    done = subprocess.run(apply, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        return f"does not apply: {done.stderr.strip().splitlines()[-1]}"
    options = ["-x", "-q", "-p", "no:cacheprovider"]  # what is named by its id runs
    if not all("::" in test for test in mutant.tests):
        options.append("--share=0/1000000")  # of whole files nothing exhaustive
    run = [sys.executable, "-m", "pytest", *options, *mutant.tests]
    try:
        done = subprocess.run(
            run, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"tests took longer than {PATIENCE:g} s"
    finally:
        subprocess.run([*apply, "--reverse"], cwd=tree, check=True)
    if done.returncode == FAILED:
        return ""
    if done.returncode == 0:
        return f"not caught: {mutant.about}"
    return f"pytest ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="patches, by name; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    arguments = parser.parse_args()
    files = [HERE / f"{name}.patch" for name in arguments.names] or sorted(HERE.glob("*.patch"))
    if missing := [file.stem for file in files if not file.is_file()]:
        parser.error(f"there is no {', '.join(missing)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs={arguments.jobs} must be at least 1")
    began, wrong = time.perf_counter(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        trees: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(arguments.jobs):
            copy_tree(pathlib.Path(folder, str(i)))
            trees.put(pathlib.Path(folder, str(i)))
        cache = str(pathlib.Path(folder, "cache"))  # what one has compiled, the next ones need not
        environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ

        def try_one(file: pathlib.Path) -> tuple[str, str, float]:
            tree, start = trees.get(), time.perf_counter()
            reason = verdict(read(file), tree, environment)
            trees.put(tree)
            return file.stem, reason, time.perf_counter() - start

        seconds = {}
        for name, reason, took in tqdm(pool.map(try_one, files), total=len(files)):
            seconds[name] = took
            if reason:
                wrong += 1
                tqdm.write(f"{name}: {reason}")
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(files) - wrong} of {len(files)} breaks caught in {minutes:.1f} min")
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:SLOWEST]
    print("slowest: " + ", ".join(f"{name} {seconds[name]:.0f} s" for name in slowest))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
