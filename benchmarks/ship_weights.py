"""Puts the network of a finished run into the package, for `cf.pretrained`.

    python benchmarks/ship_weights.py runs/laptop_0 laptop

The weights are rounded to bfloat16, and then evaluated on all test images. A JSON file beside them holds the accuracy,
the hash of the weights, the run that made them and the commit.
"""

import argparse
from pathlib import Path

from revision import commit

from cifar_fast.data.dataset import Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.model import Network
from cifar_fast.training.pretrained import CHECKED_IMAGES, Pretrained, ship
from cifar_fast.training.result import load_run


def accuracies(model: Network, recipe: Recipe, data: Dataset) -> tuple[float, float]:
    """Return the accuracy on all test images with the recipe's TTA, and that on single views of the first ones."""
    images, labels = data.test_images, data.test_labels
    whole = evaluate(model, images, labels, tta=recipe.tta, tta_margin=recipe.tta_margin)
    return whole.accuracy, evaluate(model, images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]).accuracy


def ship_run(folder: Path, name: str, data: Dataset) -> Pretrained:
    """Ship the network of the run in `folder`; raise `UserError` if it was trained on other data."""
    run = load_run(folder)
    if run.dataset["fingerprint"] != data.fingerprint:
        raise UserError(f"{folder} was trained on {run.dataset['name']}, from another source than {data.name} here")
    return ship(run, name, commit=commit(), accuracy=lambda model: accuracies(model, run.recipe, data))


def main() -> None:
    """Ship one network and say what accuracy it reaches."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("name", help="what cf.pretrained calls it")
    options = parser.parse_args()
    try:
        print(ship_run(options.run, options.name, load_cifar10()))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
