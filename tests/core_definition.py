"""Literal definitions in float64 autograd, against which every implementation is checked."""

import copy

import torch

from hfprune_dist.core.losses import SIGN_TOKENS, draw_sign_bits, signs_of
from hfprune_dist.methods import CRITERIA


def entropy(logits, **_):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def cross_entropy(logits, input_ids, **_):
    return torch.nn.functional.cross_entropy(logits[:-1], input_ids[1:])


def random_signs(logits, window, seed, **_):
    tokens, vocabulary = logits.shape
    groups = [draw_sign_bits(seed, window, group, vocabulary) for group in range(-(-tokens // SIGN_TOKENS))]
    signs = signs_of(torch.cat(groups)[:tokens], vocabulary, logits.dtype)
    return 2 * (signs * logits.softmax(-1).sqrt()).sum()


# Criterion -> its loss and the function that is summed over tokens; x is h * dL/dh.
GRADIENT_CRITERIA = {
    "entropy": (entropy, lambda x: x.abs()),
    "cross_entropy": (cross_entropy, lambda x: x.abs()),
    "fisher_signs": (random_signs, lambda x: x**2),
}


NEURONS = "mlp.down_proj"


def layers_of(model):
    """Return the decoder layers of a causal language model, whatever it calls its decoder."""
    body = model.base_model
    names = [name for name in ("decoder", "language_model", "text_model") if hasattr(body, name)]
    return (getattr(body, names[0]) if names else body).layers


# Criteria that need only one pass, of any model.
OF_ONE_PASS = sorted(name for name, each in CRITERIA.items() if each.student_by is None and "neurons" in each.units)


def definition(model, windows, criterion="entropy", seed=0, channels=1, output=NEURONS):
    """Scores of every layer's units, float64 [layers, units]: sums over windows and tokens.

    A unit is this many consecutive ``channels`` of what the projection ``output`` of each layer reads.
    """
    model = copy.deepcopy(model).double().requires_grad_()
    layers = layers_of(model)
    projections = [layer.get_submodule(output) for layer in layers]
    scores = [torch.zeros((), dtype=torch.float64) for _ in layers]
    read = [[] for _ in layers]
    for number, window in enumerate(windows):
        captured = []

        def keep(_module, inputs, captured=captured):
            hidden = inputs[0] if inputs[0].ndim == 3 else inputs[0][None]  # some see all windows' tokens as one
            masked = hidden * 1.0
            masked.retain_grad()
            captured.append((hidden, masked))
            return (masked.view_as(inputs[0]),)

        handles = [module.register_forward_pre_hook(keep) for module in projections]
        logits = model(input_ids=window[None]).logits[0]
        if criterion in GRADIENT_CRITERIA:
            loss, _ = GRADIENT_CRITERIA[criterion]
            loss(logits, input_ids=window, window=number, seed=seed).backward()
        for layer, (hidden, masked) in enumerate(captured):
            read[layer].append(hidden.detach().flatten(0, 1))
            if criterion != "fluctuation":
                scores[layer] = scores[layer] + _summed(criterion, hidden, masked.grad, channels).sum((0, 1)).detach()
        for handle in handles:
            handle.remove()
    if criterion == "fluctuation":
        weights = [projection.weight.detach() for projection in projections]
        scores = [fluctuation(torch.cat(pair[0]), pair[1], channels) for pair in zip(read, weights, strict=True)]
    if criterion == "activation_l1":
        columns = [projection.weight.detach().abs().sum(0) for projection in projections]
        scores = [of_units(pair[0].sqrt() * pair[1], channels) for pair in zip(scores, columns, strict=True)]
    return torch.stack(scores)


def fluctuation(hidden, weight, channels=1):
    """FLAP's metric of channels, in standard deviations over all channels, averaged over each unit's channels."""
    metric = (hidden - hidden.mean(0)).square().sum(0) * weight.square().sum(0)
    metric = metric**2 if channels > 1 else metric
    return of_units(metric / metric.std(), channels) / channels


def _summed(criterion, hidden, gradient, channels):
    if criterion.startswith("activation_l1"):
        return hidden**2
    _, terms = GRADIENT_CRITERIA[criterion]
    return terms(of_units(hidden * gradient, channels))


def of_units(values, channels):
    """Add up values of channels, in the last dimension, for each unit."""
    return values.unflatten(-1, (-1, channels)).sum(-1)


# Output projection of a kind of units -> the projections that make what it reads.
ROWS = {
    NEURONS: ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.o_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}


def weight_taylor(model, windows, units, output=NEURONS):
    """Scores of every layer's units, float64 [layers, units]: sum |W * dL/dW|, L all windows' mean cross-entropy."""
    model = copy.deepcopy(model).double().requires_grad_()
    logits = model(input_ids=windows).logits
    torch.stack([cross_entropy(*pair) for pair in zip(logits, windows, strict=True)]).mean().backward()
    scores = []
    for layer in model.model.layers:
        rows = [layer.get_submodule(name).weight for name in ROWS[output]]
        columns = layer.get_submodule(output).weight
        products = [weight.detach() * weight.grad for weight in (*rows, columns)]
        vectors = [*products[:-1], products[-1].T]
        scores.append(sum(product.abs().sum(1).reshape(units, -1).sum(1) for product in vectors))
    return torch.stack(scores)


def labels_and_teacher(logits, input_ids, teacher, share, temperature):
    """The loss on labels and teacher; only the teacher's logits are divided by the temperature."""
    p, log_q = (teacher / temperature).softmax(-1), logits.log_softmax(-1)
    divergence = torch.nn.functional.kl_div(log_q, p, reduction="sum") / len(logits)
    return (1 - share) * cross_entropy(logits, input_ids) + share * divergence


def coupled_taylor(model, windows, keeps=None, share=0.0, temperature=1.0):
    """Scores of every layer's neurons, float64 [layers, neurons]: a sum over windows of the mean over hidden channels
    of |gate * dL/dgate + up * dL/dup + down * dL/ddown|.

    With ``keeps``, the scores of a student from which the other neurons have really been cut; theirs are zeros.
    """
    teacher = copy.deepcopy(model).double()
    model = copy.deepcopy(model).double().requires_grad_()
    layers = layers_of(model)
    kept = [torch.arange(layer.mlp.down_proj.in_features) for layer in layers]
    if keeps is not None:
        kept = [keeps_N.nonzero().squeeze(1) for keeps_N in keeps]
        for layer, numbers in zip(layers, kept, strict=True):
            _cut(layer.mlp, numbers)
    scores = torch.zeros(len(layers), teacher.config.intermediate_size, dtype=torch.float64)
    for window in windows:
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        with torch.no_grad():
            told = teacher(input_ids=window[None]).logits[0]
        labels_and_teacher(logits, window, told, share, temperature).backward()
        for layer, (block, numbers) in enumerate(zip(layers, kept, strict=True)):
            gate, up, down = (
                part.weight * part.weight.grad for part in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
            )
            scores[layer, numbers] += (gate + up + down.T).abs().mean(dim=1).detach()
    return scores


def _cut(mlp, numbers):
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight.detach()[numbers])
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias.detach()[numbers])
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, numbers])


def moments(model, windows, seed=0, channels=1, output=NEURONS):
    """For every layer: mean h h^T, mean g g^T at the projection's output, and mean (h dL/dh)^2 of each unit."""
    model = copy.deepcopy(model).double().requires_grad_()
    layers = layers_of(model)
    grams, curvatures, fishers = ([0.0] * len(layers) for _ in range(3))
    for number, window in enumerate(windows):
        seen = []

        def keep(_module, inputs, result, seen=seen):
            inputs[0].retain_grad()
            result.retain_grad()
            seen.append((inputs[0], result))

        handles = [layer.get_submodule(output).register_forward_hook(keep) for layer in layers]
        random_signs(model(input_ids=window[None]).logits[0], window=number, seed=seed).backward()
        for layer, (hidden, result) in enumerate(seen):
            grams[layer] += hidden[0].detach().T @ hidden[0].detach() / windows.numel()
            curvatures[layer] += result.grad[0].T @ result.grad[0] / windows.numel()
            effects = of_units((hidden.detach() * hidden.grad)[0], channels)
            fishers[layer] += effects.square().sum(0) / windows.numel()
        for handle in handles:
            handle.remove()
    return list(zip(grams, curvatures, fishers, strict=True))


def label_terms(model, window):
    """The effect of each neuron on the likelihood of every token's label, for every word of the vocabulary in turn.

    Returns:
        p(y_t) [tokens t, words, 1], and for each layer h_s * dlog p(y_t)/dh_s [tokens t, words, tokens s, neurons].
    """
    captured = []

    def keep(_module, inputs):
        captured.append(inputs[0].requires_grad_())

    handles = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    log_p = model(input_ids=window[None]).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    gradients = [torch.autograd.grad(word, captured, retain_graph=True) for word in log_p.flatten()]
    products = [
        torch.stack([hidden[0].detach() * gradient[0] for gradient in of_layer]).unflatten(0, log_p.shape)
        for hidden, of_layer in zip(captured, zip(*gradients, strict=True), strict=True)
    ]
    return log_p.detach().exp()[:, :, None], products
