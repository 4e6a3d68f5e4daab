"""Write the lists of prompts beside this file that are composed, not written by hand.

emoji-train.txt, emoji-heldout.txt: names of the emoji that tiny-sd3 saw in training, and that it
did not. train.txt: sentences put together from parts, for models of photographs and paintings;
test.txt is by hand and shares none with it.
"""

import random
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.emoji import load_emoji
from src.files import write_text
from src.text import read_prompts

HERE = Path(__file__).resolve().parent
SENTENCES, SEED = 2000, 0
SUBJECTS = (
    *("a tabby cat", "a shaggy dog", "a red squirrel", "a flock of starlings", "a grey heron"),
    *("an elderly tailor", "a young violinist", "a firefighter", "two sisters", "a beekeeper"),
    *("a bowl of cherries", "a stack of pancakes", "a teapot", "a pair of spectacles"),
    *("a sailing boat", "a tram", "a bicycle", "a hot-air balloon", "a small robot"),
    *("a stone bridge", "a windmill", "a greenhouse", "a lighthouse", "a wooden cabin"),
    *("an oak tree", "a field of poppies", "a potted fern", "a pumpkin", "three white horses"),
    *("a clockwork owl", "a glass chess set", "a blue dragon", "a giant tortoise", "a typewriter"),
)
STATES = (
    *("", "", "covered in snow", "made of paper", "painted bright yellow", "seen from above"),
    *("in a red scarf", "with a long shadow", "reflected in a window", "half hidden by leaves"),
    *("wet from the rain", "lit by a candle", "next to an old suitcase", "under an umbrella"),
)
PLACES = (
    *("", "on a beach at sunrise", "in a narrow street", "on a kitchen table", "in a dark forest"),
    *("beside a mountain lake", "in an empty classroom", "on a rooftop at night", "in a desert"),
    *("at a crowded market", "in a foggy harbour", "in a sunlit garden", "on a railway platform"),
    *("inside a cave", "in front of a brick wall", "under the northern lights"),
)
MANNERS = (
    *("", "", "", "a photograph", "oil painting", "watercolour", "pencil sketch", "pixel art"),
    *("film still", "woodcut", "3D render", "close-up", "wide shot", "children's book drawing"),
)


def sentences(count: int, seed: int) -> list[str]:
    """-> so many different ones, by the seed alone."""
    chance = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        told = " ".join(filter(None, map(chance.choice, (SUBJECTS, STATES, PLACES))))
        whole = ", ".join(filter(None, (told, chance.choice(MANNERS))))
        made[whole[0].upper() + whole[1:]] = None
    return list(made)


def emoji_names(folder: Path) -> tuple[list[str], list[str]]:
    """-> the names that were trained on, and those that were held out; none is in both."""
    base = [e for e in load_emoji(folder) if not e.tone]
    held_out = dict.fromkeys(e.name for e in base if e.held_out)
    trained = dict.fromkeys(e.name for e in base if not e.held_out and e.name not in held_out)
    return list(trained), list(held_out)


def write_prompts(name: str, prompts: list[str]) -> None:
    """One a line."""
    write_text(HERE / name, "\n".join(prompts) + "\n")
    click.echo(f"{HERE / name}: {len(prompts)}")


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="The emoji packages.")
def main(data: Path | None) -> None:
    """Write train.txt, and with --data the lists of emoji.

    python src/prompts/make.py --data runs/emoji
    """
    by_hand = set(read_prompts(HERE / "test.txt"))
    write_prompts("train.txt", [s for s in sentences(SENTENCES, SEED) if s not in by_hand])
    if data:
        trained, held_out = emoji_names(data)
        write_prompts("emoji-train.txt", trained)
        write_prompts("emoji-heldout.txt", held_out)


if __name__ == "__main__":
    main()
