"""Trains the small digits classifier whose features measure distances of samples.

python examples/digits_classifier.py

Half a minute on a CPU; writes `examples/digits_classifier.safetensors`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from digits_common import CLASSIFIER_FILE, Classifier, load_digits, parse, save_weights
from torch.nn.functional import cross_entropy
from tqdm import trange


@dataclass(frozen=True)
class Settings:
    """Trains the digits classifier."""

    iterations: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0
    file: Path = CLASSIFIER_FILE
    """Where the weights go."""


def main(settings: Settings) -> None:
    """Trains on slightly noisy images and reports the held-out accuracy."""
    torch.manual_seed(settings.seed)
    train, held_out = load_digits()
    classifier = Classifier()
    optimizer = torch.optim.AdamW(
        classifier.parameters(), settings.learning_rate, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, settings.iterations
    )
    for _ in trange(settings.iterations):
        rows = torch.randint(len(train.images), (settings.batch_size,))
        images = train.images[rows]
        images = images + 0.1 * torch.randn_like(images)
        loss = cross_entropy(
            classifier(images), train.labels[rows], label_smoothing=0.05
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        guess = classifier(held_out.images).argmax(dim=1)
    accuracy = (guess == held_out.labels).float().mean().item()
    about = {
        "what": "classifier of scikit-learn's digits (8x8); 64 features",
        "held_out_accuracy": round(accuracy, 4),
        "command": "python examples/digits_classifier.py",
        "settings": {k: v for k, v in asdict(settings).items() if k != "file"},
        "data": "scikit-learn load_digits, 80 % (stratified, random_state 0)",
    }
    save_weights(classifier, settings.file, about)
    print(f"Held-out accuracy {accuracy:.4f}; wrote {settings.file}.")


if __name__ == "__main__":
    main(parse(Settings))
