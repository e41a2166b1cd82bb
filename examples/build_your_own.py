"""Build a small vision-language model that looks twice, from flexkit's three modules and plain PyTorch.

Every scene has 4 x 4 cells. One is tinted red, green or blue; each has a fine pattern of its own. The model is asked
for the tint of the odd cell, which a low-res view shows, or for its pattern, which only the high-res view shows.

    python examples/build_your_own.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexkit import AttentionMapSelector, DualResolutionEncoder, HierarchicalSelfAttention, TopK
from flexkit.attention import fractional_positions, rotary_tables

GRID, ZOOM, PATCH, DIM, HEADS = (4, 4), 2, 4, 64, 4
CELLS = GRID[0] * GRID[1]

# --- The task -------------------------------------------------------------------------------------------------------
# Over 2 x 2 pixels each pattern is zero on average: it is in the high-res view, and in the low-res one it is not.

TINTS = torch.eye(3)
PATTERNS = torch.tensor([[[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]], [[0, 0], [0, 0]]])
ANSWERS = len(TINTS) + len(PATTERNS)


def draw_scenes(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """High-res images, low-res images, questions (0: which tint? 1: which pattern?) and answers."""
    patterns = torch.randint(len(PATTERNS), (count, *GRID))
    tints, cells = torch.randint(len(TINTS), (count,)), torch.randint(CELLS, (count,))
    side = ZOOM * PATCH
    texture = PATTERNS[patterns].repeat(1, 1, 1, side // 2, side // 2)  # (count, rows, columns, side, side)
    images = texture.transpose(2, 3).reshape(count, 1, GRID[0] * side, GRID[1] * side).repeat(1, 3, 1, 1).float()
    tinted = F.one_hot(cells, CELLS).view(count, 1, *GRID) * TINTS[tints].view(count, 3, 1, 1)
    images = images + F.interpolate(tinted, scale_factor=side)
    questions = torch.randint(2, (count,))
    pattern = patterns.flatten(1).gather(1, cells[:, None])[:, 0]
    return images, F.avg_pool2d(images, ZOOM), questions, torch.where(questions == 0, tints, len(TINTS) + pattern)


# --- The model ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One decoder layer: attention that may also read high-res tokens, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = HierarchicalSelfAttention(DIM, HEADS, selector=AttentionMapSelector(TopK(2)))
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, hidden: Tensor, high_res: Tensor | None, **inputs: object) -> tuple[Tensor, Tensor]:
        """Hidden states, and what this layer's attention map selects for the next layer."""
        output = self.attention(self.attention_norm(hidden), high_res, **inputs)
        hidden = hidden + output.hidden_states
        return hidden + self.mlp(self.mlp_norm(hidden)), output.selected


class TinyVisionLanguageModel(nn.Module):
    """Image tokens, then a question token; the answer is read off the last position."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.encoder = DualResolutionEncoder(
            tower=nn.Conv2d(3, DIM, kernel_size=PATCH, stride=PATCH),
            projector=nn.Sequential(nn.GELU(), nn.Linear(DIM, DIM)),
            zoom=ZOOM,
        )
        self.questions = nn.Embedding(2, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, ANSWERS))

    def forward(self, images: Tensor, low_res: Tensor, questions: Tensor, *, look_closer: bool = True) -> Tensor:
        """Logits of the answers, ``(batch, answers)``; without looking closer, from the low-res view alone."""
        views = self.encoder(images, low_res)
        hidden = torch.cat([views.low_res, self.questions(questions)[:, None]], dim=1)
        batch, length, _ = hidden.shape

        # High-res tokens lie between the low-res ones, and so do their positions.
        image_positions = torch.arange(CELLS)[None]
        between = fractional_positions(image_positions, views.grid, views.zoom)
        inputs = {
            "grid": views.grid,
            "zoom": views.zoom,
            "image_positions": image_positions.expand(batch, -1),
            "queries": (torch.arange(length) == length - 1).expand(batch, -1),
            "rotary": rotary_tables(torch.arange(length)[None], DIM // HEADS),
            "high_res_rotary": rotary_tables(between, DIM // HEADS),
        }
        # The first layer has nothing to read yet: it only looks. Each later layer reads where the last one looked.
        selected = None
        for block in self.blocks:
            high_res = None if selected is None or not look_closer else views.high_res
            hidden, selected = block(hidden, high_res, selected=selected, **inputs)
        return self.head(hidden[:, -1])


# --- Training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: TinyVisionLanguageModel, *, look_closer: bool, count: int = 1000) -> tuple[float, float]:
    """How often each of the two questions is answered rightly, on scenes of their own."""
    images, low_res, questions, answers = draw_scenes(count)
    right = model(images, low_res, questions, look_closer=look_closer).argmax(-1) == answers
    return right[questions == 0].float().mean().item(), right[questions == 1].float().mean().item()


def main(steps: int = 250, batch: int = 64, seed: int = 0) -> list[float]:
    """Train, print what came of it, and return the losses."""
    torch.manual_seed(seed)
    model = TinyVisionLanguageModel()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        *scene, answers = draw_scenes(batch)
        loss = F.cross_entropy(model(*scene), answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}   loss {losses[-1]:.3f}")

    # The same model with its second view switched off. Trained without that view it could do no better on patterns than
    # chance either: they are not in the low-res view.
    print(f"\naccuracy            tint (chance {1 / len(TINTS):.2f})   pattern (chance {1 / len(PATTERNS):.2f})")
    for name, look_closer in (("low-res only", False), ("looking closer", True)):
        tint, pattern = accuracy(model, look_closer=look_closer)
        print(f"{name:15s} {tint:12.2f} {pattern:20.2f}")
    return losses


if __name__ == "__main__":
    main()
