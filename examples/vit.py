"""A vision transformer learns digits: RefLoRA and AdamW from the same start, on the same batches.

pip install "reflora[peft,transformers]" scikit-learn
python examples/vit.py [STEPS] [FOLDER] [MODEL]   # MODEL: a ViT's folder or hub id; default: a small random one

With random weights both train; to see which is better, take a pretrained ViT and tune the learning rate of each.
"""

import sys
import warnings

print("A vision transformer learns digits, by AdamW and by RefLoRA", flush=True)
# peft imports these where they are installed and calls what transformers has renamed: their warnings would come first
sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes", "deepspeed")))
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from transformers import ViTConfig, ViTForImageClassification, set_seed

from reflora import create_reflora_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
FOLDER = sys.argv[2] if len(sys.argv) > 2 else "vit-digits"
MODEL = sys.argv[3] if len(sys.argv) > 3 else None
LR = 3e-3
device = "cuda" if torch.cuda.is_available() else "cpu"

# 1797 grey images of 8 x 8, every fifth held out
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [N, 1, 8, 8] from -1 to 1, as ViT's
images, labels = images.to(device), torch.tensor(digits.target, device=device)
train_rows = torch.tensor([row for row in range(len(labels)) if row % 5])
test_rows = torch.arange(0, len(labels), 5)


def build():
    set_seed(0)
    if MODEL:
        model = ViTForImageClassification.from_pretrained(MODEL, num_labels=10, ignore_mismatched_sizes=True)
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
        model = ViTForImageClassification(config)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(model, lora).to(device)


def logits(model, rows):
    pixels = interpolate(images[rows], model.config.image_size, mode="bilinear")
    return model(pixel_values=pixels.expand(-1, model.config.num_channels, -1, -1)).logits


@torch.no_grad()
def evaluate(model):
    model.eval()
    found, wanted = torch.cat([logits(model, rows) for rows in test_rows.split(32)]), labels[test_rows]
    return f"loss {cross_entropy(found, wanted):.3f}, accuracy {(found.argmax(1) == wanted).float().mean():.1%}"


for name in ("AdamW", "RefLoRA"):
    model = build()
    if name == "RefLoRA":
        optimizer = create_reflora_optimizer(model, lr=LR)  # the classifier, trained in full, takes AdamW's steps
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    print(f"{name}: held-out {evaluate(model)} before")
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        rows = train_rows[torch.randperm(len(train_rows))[:32]]
        cross_entropy(logits(model, rows), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name}: held-out {evaluate(model)} after {STEPS} steps")

print(optimizer.diagnostics())
model.save_pretrained(FOLDER)
