"""All metadata is in setup.cfg but what it cannot say."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import manifest_maker

manifest_maker.template = ".ci/sdist.in"  # what the sdist holds beside the package


def description() -> str:
    """The README without what needs the repository beside it: pictures, and links to pages of `docs`."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return text + "\nThe pages that this text names are in the folder `docs` of the source distribution.\n"


setup(long_description=description())
