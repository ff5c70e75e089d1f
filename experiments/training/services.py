"""What the engine offers to the parts of a run: the frozen base as a model, scores of rows, and sampled text.

All of it leaves the random state and the mode of the trained model as they were. Where several processes share a model,
every process must call each service equally often.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LogitsProcessor

from experiments.training import hooks
from experiments.training.batches import collate, micro_batches, sent
from experiments.training.flops import Flops
from experiments.training.loss import CHUNK, shifted, summed_kl
from experiments.training.progress import bar as progress
from experiments.training.sharded_weights import ShardedWeights
from methods.part import Row, Run, generator
from methods.tools import architecture
from methods.tools.process_group import Shards

SHOWN = 16  # micro-batches of a process from which on sampling shows a bar


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device: it takes no memory until `Reference` fills it."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty | {id(buffer): buffer for buffer in model.buffers()})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a time."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


class Reference:
    """The frozen base as a model; its weights get no gradient, and it has no dropout.

    Where every trained tensor belongs to an adapter and all others are the base's, it is the trained model with its
    adapters switched off, which takes no memory. Otherwise it is a second copy of the base, shared among the processes
    as the trained model is.
    """

    def __init__(self, *, bare: nn.Module, run: Run, trained: Any, flops: Flops, size: int) -> None:
        self._bare, self._run, self._trained, self._flops, self._size = bare, run, trained, flops, size

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(the base as a model, *arguments), without a gradient."""
        with torch.no_grad():
            if not self._switches_off:
                return self._copy(function, *arguments)
            with _without_adapters(self._run.model), evaluating(self._run.model):
                return self._trained.compute(function, *arguments)

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The base's last hidden states (batch, tokens, width) of a micro-batch, as `loss` is given it."""
        lengths = hooks.lengths_of(batch)
        self._run.charge(tokens=sum(lengths), flops=self._base_flops.forward(lengths=lengths, predicted=0))
        return self.compute(architecture.hidden_states, batch["input_ids"], None, batch.get("position_ids"))

    def logits(self, rows: Tensor) -> Tensor:
        """The base's logits (rows, vocabulary) of its last hidden states (rows, width)."""
        return self.compute(_logits, rows)

    def kl(self, hidden: Tensor, reference: Tensor, *, temperature=1.0, weights=None, reverse=False) -> Tensor:
        """Σ over rows of w·KL(base‖model) in nats; `reverse`: KL(model‖base). Logits are held in chunks.

        hidden, reference   (rows, width): last hidden states by the trained model and by the base
        weights             w (rows,); None: all 1
        temperature         of both distributions; multiply by its square for gradients of the size at temperature 1
        """
        own = self._flops.step(lengths=(), labelled=len(hidden))
        theirs = self._base_flops.forward(lengths=(), predicted=len(hidden))
        self._run.charge(flops=None if own is None or theirs is None else own + theirs)
        logits_of = architecture.logits_of(self._run.model)
        settings = {"temperature": temperature, "weights": weights, "reverse": reverse}
        return summed_kl(hidden, reference, logits_of, self.logits, **settings)

    def states(self, rows: Sequence[Row]) -> list[Tensor]:
        """The base's last hidden states (labelled tokens, width) that predict each row's labels, on the run's device.

        The processes share the rows out, and each gets those of all rows.
        """
        run, states = self._run, {}
        for indices, counts in _shared(len(rows), self._size, run.shards):
            batch = collate([rows[i] for i in indices])
            ids, labels = sent(batch["input_ids"], torch.device(run.device)), batch["labels"]
            found, _ = shifted(self.compute(architecture.hidden_states, ids, None), labels)
            if counts:
                pieces = found.split((labels[:, 1:] != -100).sum(1).tolist())
                states |= dict(zip(indices, [p if run.shards.world == 1 else p.cpu() for p in pieces], strict=True))
                lengths = hooks.lengths_of(batch)
                run.charge(tokens=sum(lengths), flops=self._base_flops.forward(lengths=lengths, predicted=0))
        return [state.to(run.device) for state in _collected(states, run.shards)]

    @functools.cached_property
    def _base_flops(self) -> Flops:
        return Flops(self._bare)

    @functools.cached_property
    def _switches_off(self) -> bool:
        """Whether the trained model with its adapters switched off is exactly the base."""
        run = self._run
        adapters = any(hasattr(module, "lora_A") for module in run.model.modules())
        if not adapters or any(architecture.base_name(name) in run.base for name in run.weights):
            return False
        differ = 0
        for name, tensor in run.model.named_parameters():
            if (base := run.base.get(architecture.base_name(name))) is not None:
                own = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
                # within `compute` some tensors are gathered: whole
                theirs = base if own.shape == base.shape else run.shards.local(base)
                differ += not torch.equal(own, theirs.to(own))
        return not sum(run.shards.all_gather(differ))

    @functools.cached_property
    def _copy(self) -> Callable[..., Any]:
        """`compute` of the second copy."""
        run, model = self._run, self._bare
        assert self._base_flops  # counted while nothing is sharded
        filled: dict[int, nn.Parameter] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        where = "cpu" if run.shards.active else run.device  # what is shared is moved piece by piece
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and p.is_meta:
                    if id(p) not in filled:
                        tensor = run.base[names[id(p)]].to(where, p.dtype, copy=True)
                        filled[id(p)] = nn.Parameter(tensor, requires_grad=False)
                    module._parameters[name] = filled[id(p)]
        model.eval()
        held = [run.shards.local(p) for p in filled.values()]
        self._run.charge(bytes=sum(p.numel() * p.element_size() for p in held))
        if not run.shards.active:
            return lambda function, *arguments: function(model, *arguments)
        dtype = next(iter(filled.values())).dtype
        device = torch.device(run.device)
        return ShardedWeights(model, shards=run.shards, compute_dtype=dtype, device=device, base=run.base).compute


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    # peft's own `disable_adapter` also changes which tensors require a gradient, in the middle of a forward pass
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class Teacher(Reference):
    """The trained model at other values of its trained tensors, which a part holds: a mean over the steps, say.

    weights  by the names of `run.weights`, this process's rows in the same dtype

    `states` swaps both values for a time, so that nothing but the part's tensors is held twice, whatever else the
    model has; therefore it belongs between steps (`examples`), not into a forward pass. `kl` needs the logits in a
    forward pass: a head that is trained is held once more, as it was at the last `states`, in the dtype to compute in.
    """

    def __init__(self, weights: Mapping[str, Tensor], **made: Any) -> None:
        super().__init__(**made)
        run, bare = self._run, architecture.head(self._bare)
        names = {id(p): name for name, p in run.model.named_parameters()}
        head = {own: names[id(p)] for own, p in architecture.head(run.model).named_parameters()}
        self._weights, self._head, self._swapped = weights, {}, False
        self._trained_head = {own: name for own, name in head.items() if name in run.weights}
        self._dtype = bare.weight.dtype
        run.charge(bytes=sum(weight.numel() * weight.element_size() for weight in weights.values()))
        if run.shards.first:
            run.charge(bytes=sum(getattr(bare, own).numel() * self._dtype.itemsize for own in self._trained_head))

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with torch.no_grad(), self._in_place(), evaluating(self._run.model):
            return self._trained.compute(function, *arguments)

    def states(self, rows: Sequence[Row]) -> list[Tensor]:
        shards, shapes = self._run.shards, self._run.shapes
        self._head = {
            own: shards.whole(self._weights[name], shapes[name]).to(self._dtype, copy=True)
            for own, name in self._trained_head.items()
        }
        with self._in_place():
            return super().states(rows)

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        model, head = self._run.model, architecture.head(self._run.model)
        own = {name: head._parameters[name] for name in self._head}
        head._parameters |= self._head  # other tensors: those that autograd has saved stay as they are
        try:
            return _logits(model, rows)
        finally:
            head._parameters |= own

    @functools.cached_property
    def _base_flops(self) -> Flops:
        return self._flops

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The run's weights are this teacher's for a time, and this teacher's the run's."""
        if self._swapped:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._swapped = not self._swapped
        for name, weight in self._run.weights.items():
            held = weight.clone()
            weight.copy_(self._weights[name])
            self._weights[name].copy_(held)
        self._trained.update_model()


def offer(run: Run, *, bare: nn.Module, trained: Any, flops: Flops, prompts: int, tokenizer: Any) -> None:
    """Give a run its services; `prompts` of them are continued together."""
    made = {"bare": bare, "run": run, "trained": trained, "flops": flops, "size": prompts}
    run.reference, run.teacher = Reference(**made), functools.partial(Teacher, **made)
    services = Services(run=run, trained=trained, flops=flops, size=prompts, tokenizer=tokenizer)
    run.score, run.sample, run.encode, run.decode = services.score, services.sample, services.encode, services.decode


class Services:
    """`score`, `sample`, `encode` and `decode` of `methods.part.Run`, on the trained model or on the base."""

    def __init__(self, *, run: Run, trained: Any, flops: Flops, size: int, tokenizer: Any) -> None:
        self._run, self._trained, self._flops, self._size, self._tokenizer = run, trained, flops, size, tokenizer

    def compute(self, base: bool, function: Callable[[nn.Module], Any]) -> Any:
        if base:
            return self._run.reference.compute(function)
        with torch.no_grad(), evaluating(self._run.model):
            return self._trained.compute(function)

    def score(self, rows: Sequence[Row], *, base: bool = False) -> list[Tensor]:
        """log p of each row's labelled tokens, (labelled tokens,) in float32 on the CPU, by the model or the base."""
        run, scores = self._run, {}
        for indices, counts in _shared(len(rows), self._size, run.shards):
            batch = collate([rows[i] for i in indices])
            ids, labels = sent(batch["input_ids"], torch.device(run.device)), batch["labels"]
            values = self.compute(base, functools.partial(_log_probabilities, ids=ids, labels=labels))
            if counts:
                sizes = (labels[:, 1:] != -100).sum(1).tolist()
                scores |= dict(zip(indices, values.split(sizes), strict=True))
                lengths = hooks.lengths_of(batch)
                run.charge(tokens=sum(lengths), flops=self._flops.forward(lengths=lengths, predicted=sum(sizes)))
        return _collected(scores, run.shards)

    def sample(self, *, prompts: Sequence[Sequence[int]], base: bool = False, **arguments: Any) -> list[list[int]]:
        """Continuations of prompts as `Sampler` gives them, by the model or by the base."""
        run = self._run
        together = run.shards.world > 1
        compute = functools.partial(self.compute, base)
        draw = Sampler(compute, self._tokenizer, seed=run.seed, size=self._size, shards=run.shards, together=together)
        few = len(prompts) <= SHOWN * self._size * run.shards.world
        with progress(total=len(prompts), desc="sample", unit="text", disable=few or not run.shards.first) as bar:
            texts = draw(prompts=prompts, done=bar.update, **arguments)
        own = slice(run.shards.rank, None, run.shards.world)
        written = [len(text) for text in texts[own]]
        lengths = [len(prompt) + count for prompt, count in zip(prompts[own], written, strict=True)]
        run.charge(tokens=sum(lengths), flops=self._flops.forward(lengths=lengths, predicted=sum(written)))
        return texts

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, as general text is encoded."""
        from evaluation.encode import encode_text

        return encode_text(self._tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class Sampler:
    """Continuations of prompts, which are shared out among the processes.

    compute   compute(function) → function(model), without a gradient and in evaluation mode
    size      prompts that are continued together
    together  the processes share the model, so that all go on until the last one has finished
    """

    def __init__(
        self, compute: Callable, tokenizer: Any, *, seed: int, size: int, shards: Shards, together: bool = False
    ) -> None:
        self._compute, self._tokenizer, self._seed, self._size = compute, tokenizer, seed, size
        self._shards, self._together = shards, together

    def __call__(
        self,
        *,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        temperature: float = 1.0,
        key: Sequence[int | str] = (),
        until: Sequence[str] = (),
        ended: bool = False,
        size: int | None = None,
        done: Callable[[int], Any] | None = None,
    ) -> list[list[int]]:
        """At most `tokens` token ids for each prompt (token ids, not empty), without the end of text.

        temperature  of the softmax that tokens are drawn from; 0 takes the likeliest
        key          draws depend on the seed, this key and the number of the prompt, and on nothing else in the batch
        until        texts that end a continuation, with the token that completes one
        ended        with the end of text, where a continuation has come to one
        size         prompts that are continued together, in place of the sampler's own number
        done         called with the number of prompts that all processes have continued since the last call
        """
        from evaluation.generate import StopStrings, generated

        texts: dict[int, list[int]] = {}
        size = size or self._size
        each = size * self._shards.world
        for number, (indices, counts) in enumerate(_shared(len(prompts), size, self._shards)):
            draws = [generator(self._seed, "sample", *key, index) for index in indices]
            rows = [prompts[index] for index in indices]
            stop = StopStrings(self._tokenizer, tuple(until), start=max(map(len, rows)), rows=len(rows))
            continuing = functools.partial(
                generated,
                tokenizer=self._tokenizer,
                rows=rows,
                tokens=tokens,
                processors=[_Gumbel(temperature, draws)] if temperature else [],
                criteria=[stop] if until else [],
                together=self._together,
                ended=ended,
            )
            written = self._compute(lambda model, run=continuing: run(model=model))
            if counts:
                written = [stop.cut(row) for row in written] if until else written
                texts |= dict(zip(indices, written, strict=True))
            if done:
                done(min(each, len(prompts) - number * each))
        return _collected(texts, self._shards)


class Sampling:
    """sample(model=, prompts=, …) for a preparation, in which each process has the whole model; else as `Sampler`.

    flops  of each call, in all processes together; None where they are not known
    """

    def __init__(self, tokenizer: Any, **arguments: Any) -> None:
        self.flops: list[float | None] = []
        self._tokenizer, self._arguments = tokenizer, arguments

    def __call__(self, *, model: nn.Module, prompts: Sequence[Sequence[int]], **arguments: Any) -> list[list[int]]:
        def compute(function: Callable[[nn.Module], Any]) -> Any:
            with torch.no_grad(), evaluating(model):
                return function(model)

        texts = Sampler(compute, self._tokenizer, **self._arguments)(prompts=prompts, **arguments)
        lengths = [len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True)]
        self.flops.append(Flops(model).forward(lengths=lengths, predicted=sum(map(len, texts))))
        return texts


class _Gumbel(LogitsProcessor):
    """Logits over the temperature plus Gumbel noise: their argmax is a draw from the softmax, row by row.

    Every row has its own random numbers, so that a draw does not depend on the other rows of its batch.
    """

    def __init__(self, temperature: float, draws: Sequence[torch.Generator]):
        self._temperature, self._draws = temperature, draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = [torch.rand(scores.shape[1], generator=draw, dtype=torch.float64) for draw in self._draws]
        noise = -torch.log(-torch.log(torch.stack(uniform)))
        return scores.float() / self._temperature + noise.to(scores.device, torch.float32)


def _shared(count: int, size: int, shards: Shards) -> Iterator[tuple[list[int], int]]:
    """This process's share of `count` things in batches, each with 1; and batches with 0, so that all have as many."""
    shares = [list(range(rank, count, shards.world)) for rank in range(shards.world)]
    own = list(micro_batches(shares[shards.rank], size))
    for indices in own:
        yield list(indices), 1
    for _ in range(-(-len(shares[0]) // size) - len(own)):
        yield [0], 0


def _collected(own: Mapping[int, Any], shards: Shards) -> list:
    """The values of all processes, in the order of their indices."""
    together = {index: value for each in shards.all_gather(dict(own)) for index, value in each.items()}
    return [together[index] for index in sorted(together)]


def _logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits of hidden states, which may be older than a time in which the model computes in float32 (`exact`)."""
    return architecture.logits_of(model)(rows.to(architecture.plain(model).get_output_embeddings().weight.dtype))


def _log_probabilities(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """log p of the labelled tokens of a batch, in its order, on the CPU."""
    rows, targets = shifted(architecture.hidden_states(model, ids, None), labels)
    logits_of = architecture.logits_of(model)
    pieces = [
        torch.log_softmax(logits_of(part).float(), dim=-1).gather(1, labels_[:, None])[:, 0]
        for part, labels_ in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(pieces).cpu() if pieces else torch.zeros(0)
