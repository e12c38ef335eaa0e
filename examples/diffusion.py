"""diffusers' training loop on a tiny UNet: it has learnt to draw the digits 0 to 4, and a LoRA teaches it 5 to 9.

pip install "reflora[peft]" diffusers scikit-learn
python examples/diffusion.py [STEPS] [FOLDER]   # a minute on two cores

The loop is that of diffusers' train_text_to_image_lora.py: add noise, predict it, step. FOLDER gets the adapter as
diffusers saves it; `python -m reflora doctor FOLDER` and `resize` read it.
"""

import copy
import sys
import warnings

print("A tiny UNet has learnt to draw some digits; LoRAs by AdamW and RefLoRA learn the others", flush=True)
# peft imports these where they are installed and calls what transformers has renamed: their warnings would come first
sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes", "deepspeed")))
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from sklearn.datasets import load_digits
from torch.nn.functional import mse_loss, one_hot

from reflora import create_reflora_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
FOLDER = sys.argv[2] if len(sys.argv) > 2 else "digits-lora"
LR = 2e-3
device = "cuda" if torch.cuda.is_available() else "cpu"

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 8 - 1  # [N, 1, 8, 8] from -1 to 1
labels = torch.tensor(digits.target, device=device)
noising = DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
new = (labels >= 5).nonzero()[:, 0]
base_rows, train_rows, test_rows = (labels < 5).nonzero()[:, 0], new[new % 5 > 0], new[new % 5 == 0]


def loss_of(unet, rows):
    noise = torch.randn_like(images[rows])
    timesteps = torch.randint(0, noising.config.num_train_timesteps, (len(rows),), device=device)
    # two words, [batch, 2, 10], where the states of a text encoder would be
    prompts = torch.stack([one_hot(labels[rows], 10), one_hot(labels[rows] % 2, 10)], dim=1).float()
    noisy = noising.add_noise(images[rows], noise, timesteps)
    return mse_loss(unet(noisy, timesteps, encoder_hidden_states=prompts).sample, noise)


def train(unet, optimizer, rows, steps):
    for step in range(steps):
        torch.manual_seed(step)
        loss_of(unet, rows[torch.randint(len(rows), (32,))]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out(unet):
    torch.manual_seed(0)
    return torch.stack([loss_of(unet, test_rows) for _ in range(8)]).mean().item()


torch.manual_seed(0)
with torch.device(device):
    base = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=10, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
train(base, torch.optim.AdamW(base.parameters(), lr=2e-3), base_rows, STEPS)
base.requires_grad_(False)
print(f"base, which knows 0 to 4: held-out loss on 5 to 9 {held_out(base):.3f}")

for name in ("AdamW", "RefLoRA"):
    unet = copy.deepcopy(base)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]  # convolutions too
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    if name == "RefLoRA":
        optimizer = create_reflora_optimizer(unet, lr=LR)
    else:
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=LR)
    before = held_out(unet)
    train(unet, optimizer, train_rows, STEPS)
    print(f"{name}: held-out loss {before:.3f} before, {held_out(unet):.3f} after {STEPS} steps")

print(optimizer.diagnostics())
unet.save_lora_adapter(FOLDER)
