"""What neurons of experts are scored by, from its definition: a mask on every neuron at every token."""

import copy

import torch
from core_definition import GRADIENT_CRITERIA
from families import SHAPE
from transformers.integrations import moe

from hfprune_dist.checkpoints.families import Family

LAYERS, COUNT, WIDTH = SHAPE["num_hidden_layers"], 4, SHAPE["intermediate_size"]


def family_of(model):
    """Where its parts are."""
    name = type(model).__name__.removesuffix("ForCausalLM")
    return Family(model.config.model_type, name, mlp="block_sparse_moe" if name == "GraniteMoe" else "mlp")


def experts_of(model):
    """Number of a layer with experts -> the module that has them."""
    found = {}
    for number, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3:
                found[number] = module
    return found


def gated(experts, made):
    """What neurons of experts make of what gate and up put out, as the papers have it."""
    if experts.is_transposed:  # gpt_oss, whose gate and up are interleaved
        gate, up = made[..., 0::2].clamp(max=experts.limit), made[..., 1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    gate, up = made.tensor_split(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


class Definition:
    """Every expert computes for every token, with a mask on its neurons; routing weights are zero of other experts.

    Attributes:
        masks, hidden: of each layer with experts, masks and activations [experts, tokens, neurons] in the last forward.
    """

    def __init__(self, model, keeps=None):
        self._keeps = keeps
        self._layers = {module: number for number, module in experts_of(model).items()}
        self.masks, self.hidden = {}, {}
        for module in self._layers:
            module.config._experts_implementation = "definition"
            module.definition = lambda *inputs, module=module: self._compute(module, *inputs)

    def _compute(self, module, hidden_NC, index_NK, weights_NK):
        number, count = self._layers[module], module.num_experts
        layout = "nc,ecd->end" if module.is_transposed else "nc,edc->end"
        made = torch.einsum(layout, hidden_NC, module.gate_up_proj)
        made = made + module.gate_up_proj_bias[:, None] if module.has_bias else made
        hidden_END = gated(module, made)
        routing_EN = torch.stack([(weights_NK * (index_NK == expert)).sum(1) for expert in range(count)])
        masks_END = torch.ones_like(hidden_END)
        if self._keeps is not None:
            masks_END = masks_END * self._keeps[number].view(count, 1, -1)
        self.masks[number] = masks_END = masks_END.detach().requires_grad_()
        self.hidden[number] = hidden_END.detach() * (routing_EN > 0)[..., None]
        layout = "end,edc->enc" if module.is_transposed else "end,ecd->enc"
        outputs = torch.einsum(layout, hidden_END * masks_END, module.down_proj)
        outputs = outputs + module.down_proj_bias[:, None] if module.has_bias else outputs
        return (outputs * routing_EN[..., None]).sum(0).to(hidden_NC.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register("definition", lambda module, *inputs: module.definition(*inputs))


def definition(model, windows, criterion, seed=0, keeps=None):
    """Sums over windows and tokens, float64 [layers, experts * neurons]; zeros in layers without experts.

    ``keeps`` is a student's mask of units, bool [experts * neurons] of each layer.
    """
    dense = copy.deepcopy(model).double().requires_grad_()
    student, scored = dense, Definition(dense)
    if criterion == "self_distillation":
        student = copy.deepcopy(model).double().requires_grad_()
        scored = Definition(student, keeps)
    sums = torch.zeros(LAYERS, COUNT * WIDTH, dtype=torch.float64)
    for number, window in enumerate(windows):
        teacher = dense(input_ids=window[None]).logits[0].detach()
        logits = student(input_ids=window[None]).logits[0]
        if criterion == "activation":
            for layer, hidden_END in scored.hidden.items():
                sums[layer] += hidden_END.square().sum(1).flatten()
            continue
        loss, terms = GRADIENT_CRITERIA[criterion]
        loss(logits, input_ids=window, window=number, seed=seed, teacher=teacher).backward()
        for layer, masks_END in scored.masks.items():
            # A mask's gradient is h * dL/dh, but where the mask is 0: there it is what the neuron's return would do.
            sums[layer] += terms(masks_END.grad).sum(1).flatten()
    return sums
