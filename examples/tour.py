# %% [markdown]
# # A tour of reflora
#
# Train an adapter with RefLoRA and with AdamW from the same start, look inside it, cut its rank, and compare: a
# minute or two on a CPU. `make notebook` builds `tour.ipynb` from `tour.py`.
#
# In a notebook elsewhere, first: `%pip install reflora peft transformers matplotlib`

# %%
import contextlib
import inspect
import sysconfig
from pathlib import Path

import torch
from IPython.display import Image, display
from matplotlib import pyplot
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import reflora
from reflora.__main__ import main as command

STEPS, RANK, LR = 300, 16, 3e-3
LINES = {
    "AdamW": {"color": "0.8", "lw": 4},
    "RefLoRA": {"color": "tab:blue", "lw": 1.2},
    "InvariantAdamW": {"color": "tab:orange", "lw": 1.2},
}

# %% [markdown]
# ## A model and something to learn
#
# A small Llama that reads bytes. In full training it learns half of Python's standard library, and then an adapter
# learns one file.

# %%
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = {"base": b"".join(map(Path.read_bytes, sources[::2]))}
text["adapter"] = Path(inspect.__file__).read_bytes()
windows = {name: torch.tensor(list(found)).unfold(0, 128, 128) for name, found in text.items()}
rows = torch.arange(len(windows["adapter"]))
train_rows, test_rows = rows[rows % 5 > 0], rows[rows % 5 == 0]


def new_base():
    set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))


def train(model, optimizer, windows, steps=STEPS):
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = windows[torch.randint(len(windows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out(model):
    batches = windows["adapter"][test_rows].split(32)
    return sum(model(input_ids=one, labels=one).loss.item() * len(one) for one in batches) / len(test_rows)


base = new_base()
train(base, torch.optim.AdamW(base.parameters(), lr=2e-3), windows["base"])
base.save_pretrained("base")
print(f"base: held-out loss {held_out(base):.3f}")

# %% [markdown]
# ## Train
#
# `create_reflora_optimizer` takes the place of `torch.optim.AdamW`; nothing else changes. B starts at 0, so both
# optimizers take the same first step. Their best learning rates need not be the same: on a task of your own, tune
# both.

# %%
losses, scores = {}, {}
for name, optimizer_class in {"AdamW": None, "RefLoRA": None, "InvariantAdamW": reflora.InvariantAdamW}.items():
    set_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
    if name == "AdamW":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    else:
        optimizer = reflora.create_reflora_optimizer(model, optimizer_class, lr=LR)
    losses[name] = train(model, optimizer, windows["adapter"][train_rows])
    scores[name] = held_out(model)
    model.save_pretrained(f"adapter-{name}")
    print(f"{name}: held-out loss {scores[name]:.3f}")
print(optimizer.diagnostics())

# %%
figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
for name, found in losses.items():
    smooth = torch.tensor(found).unfold(0, 10, 1).mean(1)
    axis.plot(smooth, label=name, **LINES[name])
axis.set(xlabel="step", ylabel="training loss, mean of 10 steps")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
pyplot.show()

# %% [markdown]
# ## Look inside
#
# How well each layer is conditioned, whether A and B are balanced, and how many directions its update B A uses. On a
# command line: `python -m reflora doctor adapter-RefLoRA --png doctor.png`.

# %%
command(["doctor", "adapter-RefLoRA", "--png", "doctor.png"])
display(Image("doctor.png", width=720))

# %% [markdown]
# ## Cut the rank
#
# Each layer keeps the directions of its update that hold 90 % of its energy, by the exact singular value
# decomposition of B A. `--rank N` cuts all layers to one rank.

# %%
command(["resize", "adapter-RefLoRA", "small", "--energy", "0.9", "--png", "spectra.png"])
display(Image("spectra.png", width=720))

# %% [markdown]
# ## Compare
#
# What does a lower rank cost? The held-out loss of both adapters, cut to each rank; the dashed lines are the whole
# ones.

# %%
ranks, curves = [1, 2, 4, 8], {}
for name in scores:
    curves[name] = []
    for rank in ranks:
        with contextlib.redirect_stdout(None):
            command(["resize", f"adapter-{name}", f"{name}-{rank}", "--rank", str(rank)])
        cut = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), f"{name}-{rank}")
        curves[name].append(held_out(cut))
    print(name, ", ".join(f"rank {rank}: {loss:.3f}" for rank, loss in zip(ranks, curves[name])))

# %%
figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
for name, found in curves.items():
    axis.plot(ranks, found, "o-", label=name, **LINES[name])
    axis.axhline(scores[name], color=LINES[name]["color"], lw=1, ls="--")
axis.set(xlabel=f"rank after resize, from {RANK}", ylabel="held-out loss", xscale="log", xticks=ranks)
axis.set_xticklabels(ranks)
axis.minorticks_off()
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
pyplot.show()
