"""The definition of what experts compute: every expert on every token, with a mask on each of its neurons."""

import copy
from collections import defaultdict
from functools import partial

import torch
from core_definition import GRADIENT_CRITERIA
from families import SHAPE
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.selection import top_units
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept

KIND, WHOLE = "expert_neurons", "experts"
LAYERS, COUNT, WIDTH = SHAPE["num_hidden_layers"], 4, SHAPE["intermediate_size"]


def family_of(model):
    """Return the family, which knows where the model's parts are."""
    name = type(model).__name__.removesuffix("ForCausalLM")
    return Family(model.config.model_type, name, mlp="block_sparse_moe" if name == "GraniteMoe" else "mlp")


def experts_of(model):
    """Return layer number -> its module of experts, for layers that have one."""
    found = {}
    for number, layer in enumerate(model.get_decoder().layers):
        for module in layer.modules():
            if hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3:
                found[number] = module
    return found


def some_kept(checkpoint, share, structure=NEURONS, *, groups=False):
    """Keep a share, at random, of every MLP's neurons or each group's experts; and one KV group, if ``groups``."""
    generator = torch.Generator().manual_seed(1)
    units = {}
    for pruned in checkpoint.pruned_kinds([structure]):
        width = round(share * pruned.width)
        units[pruned.kind] = [
            top_units(torch.rand(count, generator=generator), width * pruned.copies * (count > 0), pruned.parts)
            for count in pruned.counts
        ]
    if groups:
        units["kv_groups"] = [torch.tensor([layer % 2]) for layer in range(checkpoint.num_layers)]
    return Kept.of_all_layers(units)


def gated(experts, made):
    """Return the activations of experts' neurons from the outputs of gate and up, as the papers define them."""
    if experts.is_transposed:  # gpt_oss, whose gate and up are interleaved
        gate, up = made[..., 0::2].clamp(max=experts.limit), made[..., 1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    gate, up = made.tensor_split(2, dim=-1)
    if hasattr(experts, "swiglu_limit"):  # minimax_m3_vl_text
        gate, up = gate.clamp(max=experts.swiglu_limit), up.clamp(-experts.swiglu_limit, experts.swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(experts.swiglu_alpha * gate)
    return gate * torch.sigmoid(gate) * up


class Definition:
    """Lets every expert compute every token, with masks on neurons; its routing weight is zero where it isn't chosen.

    Args:
        others: (kind, layer) -> name of the output projection of neurons that belong to no expert.

    Attributes:
        masks, hidden: (kind, layer) -> masks and activations [..., tokens, neurons] in the last forward.
        routed: layer -> norms of experts' outputs, as weighted by the router, and whether they were given the token,
            [2, experts, tokens] in the last forward.
        routing: layer -> weights of the experts' outputs [experts, tokens] in the last forward.
    """

    def __init__(self, model, others=None):
        self.masks, self.hidden, self.routed, self.routing = {}, {}, {}, {}
        for number, module in experts_of(model).items():
            module.config._experts_implementation = "definition"
            module.definition = partial(self._compute, (KIND, number), module)
        for place, name in (others or {}).items():
            model.get_submodule(name).register_forward_pre_hook(partial(self._before, place))

    def _before(self, place, _module, inputs):
        self.hidden[place] = inputs[0].detach()
        return (inputs[0] * self._masks(place, inputs[0]),)

    def _masks(self, place, hidden_ND):
        self.masks[place] = torch.ones_like(hidden_ND).requires_grad_()
        return self.masks[place]

    def _compute(self, place, module, hidden_NC, index_NK, weights_NK):
        layout = "nc,ecd->end" if module.is_transposed else "nc,edc->end"
        made = torch.einsum(layout, hidden_NC, module.gate_up_proj)
        made = made + module.gate_up_proj_bias[:, None] if module.has_bias else made
        hidden_END = gated(module, made)
        numbers = range(module.num_experts)
        routing_EN = torch.stack([(weights_NK * (index_NK == expert)).sum(1) for expert in numbers])
        self.routing[place[1]] = routing_EN.detach()
        masks_END = self._masks(place, hidden_END)
        self.hidden[place] = hidden_END.detach() * (routing_EN > 0)[..., None]
        layout = "end,edc->enc" if module.is_transposed else "end,ecd->enc"
        outputs = torch.einsum(layout, hidden_END * masks_END, module.down_proj)
        outputs = outputs + module.down_proj_bias[:, None] if module.has_bias else outputs
        self.routed[place[1]] = torch.stack([(outputs * routing_EN[..., None]).norm(dim=-1), routing_EN > 0]).detach()
        return (outputs * routing_EN[..., None]).sum(0).to(hidden_NC.dtype)


@torch.no_grad()
def projections(checkpoint, windows_ST):
    """For each expert and each other MLP of a mixture, yield kind, layer, number and, in float64, its down projection's
    weight [hidden_size, channels] and that projection's input [windows, tokens, channels] times the routing weight.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    kinds = {one.kind: one for one in checkpoint.pruned_kinds([NEURONS])}
    places = [(kind, layer) for kind, units in kinds.items() for layer, count in enumerate(units.counts) if count]
    names = {place: kinds[place[0]].tensor(place[1], kinds[place[0]].output) for place in places}
    seen = Definition(model, {place: name for place, name in names.items() if place[0] != KIND})
    model(input_ids=windows_ST)
    for place, name in names.items():
        module, hidden = model.get_submodule(name), seen.hidden[place]
        weights = [module.weight] if place[0] != KIND else module.down_proj
        routing = seen.routing[place[1]] if place[0] == KIND else torch.ones(1, windows_ST.numel())
        reads = hidden.view(len(routing), windows_ST.numel(), -1) * routing[..., None]
        for expert, (weight, read_ND) in enumerate(zip(weights, reads, strict=True)):
            weight_CD = weight.T if getattr(module, "is_transposed", False) else weight
            yield *place, expert, weight_CD.data, read_ND.unflatten(0, windows_ST.shape)


moe.ALL_EXPERTS_FUNCTIONS.register("definition", lambda module, *inputs: module.definition(*inputs))


def routed_outputs(model, windows):
    """(kind, layer) -> means over the tokens given to each expert, float64 [experts]; see ``Definition``."""
    dense, sums = copy.deepcopy(model).double(), defaultdict(float)
    scored = Definition(dense)
    for window in windows:
        dense(input_ids=window[None])
        for layer, terms_2EN in scored.routed.items():
            sums[WHOLE, layer] += terms_2EN.sum(-1)
    return {place: sum_E / tokens_E.clamp(min=1) for place, (sum_E, tokens_E) in sums.items()}


def definition(model, windows, criterion, seed=0, *, others=None):
    """(kind, layer) -> sums over windows and tokens, float64 [units]; of activations not for whole experts."""
    dense = copy.deepcopy(model).double().requires_grad_()
    scored = Definition(dense, others)
    sums = defaultdict(float)
    for number, window in enumerate(windows):
        logits = dense(input_ids=window[None]).logits[0]
        if criterion == "activations":
            for place, hidden_ND in scored.hidden.items():
                sums[place] += hidden_ND.square().sum(-2).flatten()
            continue
        loss, terms = GRADIENT_CRITERIA[criterion]
        loss(logits, input_ids=window, window=number, seed=seed).backward()
        for place, masks_ND in scored.masks.items():
            # A mask's gradient is h * dL/dh.
            sums[place] += terms(masks_ND.grad).sum(-2).flatten()
            if place[0] == KIND:  # an expert's mask is a single one on all of its neurons
                sums[WHOLE, place[1]] += terms(masks_ND.grad.sum(-1)).sum(-1)
    return dict(sums)
