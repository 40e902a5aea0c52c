"""Run in the bare environment, in an empty folder: every command, and what needs an extra.

Prints as JSON what each command, and each use of an extra, ended with: an empty string, or its error.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from lottery_tickets import Mask, create_magnitude_mask
from lottery_tickets.cli import app
from lottery_tickets.errors import MissingExtraError
from lottery_tickets.large_models import load_model, load_tokenizer, map_model, plan_memory
from lottery_tickets.reports import write_figures, write_report
from lottery_tickets.structured import save_onnx
from lottery_tickets.training import make_optimizer

OWN = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

def data():
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    labels = inputs[:, :3].argmax(1)
    train = torch.utils.data.TensorDataset(inputs[:32], labels[:32])
    train = torch.utils.data.DataLoader(train, 8, shuffle=True)
    return train, [(inputs[32:48], labels[32:48])], [(inputs[48:], labels[48:])]
"""

TICKET = "tickets/magnitude-0.5.safetensors"
COMMANDS = {
    # What needs no extra.
    "mask": "folder -s 0.5 -s 0.7 -o tickets",
    "inspect": TICKET,
    "overlap": f"{TICKET} tickets/magnitude-0.7.safetensors",
    "apply": f"folder {TICKET} -o pruned",
    "inspect its copy": f"{TICKET} --model pruned",
    "early-bird": "lenet-300-100 --data mnist -s 0.5 --lr 0.1 --epochs 1 --batch-size 512 -o bird",
    "imp": "--model own:model --data own:data --rounds 1 --target 0.5 --epochs 1 --lr 0.1 --seeds 2 -o run",
    "verdict": "run --controls dense,random_mask",
    "stability": "run --steps 0,1 --seeds 2 --points 2",
    # And what does.
    "plan": "SmolLM2-135M --operation fisher --dtype float32 --batch-size 4 --context 64",
    "mask of the hub": "HuggingFaceTB/SmolLM2-135M -s 0.5 -o hub",
    "score": "folder --criterion synflow -o scores",
    "compare": "folder --criteria magnitude -s 0.5 --text text.txt",
    "evaluate": f"folder {TICKET} --text text.txt",
    "unit-mask": "folder --unit neuron -s 0.5 -o units.safetensors",
    "extract": f"folder {TICKET} -o smaller",
    "demo": "-o demo",
    "report": f"{TICKET} -o report.html",
    "report with figures": f"{TICKET} -o report.html --figures figures",
    "early-bird with a plot": "lenet-300-100 --data mnist -s 0.5 --lr 0.1 --epochs 1 --plot -o plotted",
    "stability with a plot": "run --steps 0,1 --seeds 2 --points 2 --plot",
}


def command(name: str, arguments: str) -> str:
    done = CliRunner().invoke(app, [name.partition(" ")[0], *arguments.split()])
    return "" if done.exit_code == 0 else done.stderr or repr(done.exception)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


USES: dict[str, Callable[[], object]] = {
    "a model": lambda: load_model("folder"),
    "a tokenizer": lambda: load_tokenizer("folder"),
    "a model in blocks": lambda: map_model("configured").__enter__(),
    "a ticket of the hub": lambda: Mask.from_pretrained("someone/ticket"),
    "a ticket for the hub": lambda: create_magnitude_mask(network(), 0.5).push_to_hub("someone/ticket"),
    "a plan by a config": lambda: plan_memory("SmolLM2-135M", "mask"),
    "callbacks of transformers": lambda: importlib.import_module("lottery_tickets.integrations.transformers"),
    "callbacks of Lightning": lambda: importlib.import_module("lottery_tickets.integrations.lightning"),
    "eight bits": lambda: make_optimizer("adamw8bit", network().named_parameters(), lr=0.1),
    "ONNX": lambda: save_onnx(network(), "model.onnx", example_inputs=torch.randn(2, 6)),
    "a report": lambda: write_report(TICKET, "report.html"),
    "figures": lambda: write_figures(TICKET, "figures"),
}


def use(function: Callable[[], object]) -> str:
    try:
        function()
    except MissingExtraError as error:
        return str(error)
    return ""


def material() -> None:
    """Checkpoints without and with a configuration, a text, and a network of the user's own."""
    weights = {f"layers.{number}.q_proj.weight": torch.randn(8, 8) for number in range(2)}
    for folder in (Path("folder"), Path("configured")):
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
    Path("configured/config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    Path("text.txt").write_text("a text", encoding="utf-8")
    Path("own.py").write_text(OWN, encoding="utf-8")


if __name__ == "__main__":
    material()
    torch.set_num_threads(1)
    done = {name: command(name, arguments) for name, arguments in COMMANDS.items()}
    print(json.dumps({"commands": done, "uses": {name: use(one) for name, one in USES.items()}}))
