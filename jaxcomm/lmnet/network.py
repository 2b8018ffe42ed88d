"""Networks of language models (LMNet, Wu, Wang & Yao, ICML 2026, arXiv 2505.12741). Vertices are language models without
embedding and head, edges are trainable modules. Layers of vertices are connected as in a multilayer perceptron.

    X[l + 1, j] = T(sum_i e[l, i, j](X[l, i]))

T is a decoder's stack of blocks with its final norm. The first layer has one vertex, which embeds the tokens. The last
layer has one vertex, which has the head. Every vertex and every edge is causal over positions. So the whole network is
one autoregressive model (`LanguageModel`): `forward`, `generate`, agents and protocols accept it like `Params`.

Choices that the paper leaves open (size and initialisation of edges, interior norms) are fields of `EdgeConfig` and
`NetworkConfig`.

Letters besides those of `config.py`: I sources and J targets of a stack of edges; M vertices that share weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxcomm.cache import ALONE, Attended, KVCache
from jaxcomm.config import AnyArray, EdgeConfig, ModelConfig, NetworkConfig, check_widths
from jaxcomm.language_model import PLAIN, Training
from jaxcomm.layers import Surroundings, angles_of, rotary
from jaxcomm.lmnet import edges
from jaxcomm.model import Params, embed, final_norm, run_blocks, unembed


class Wires(struct.PyTreeNode):
    """The trainable part of a network whose vertices are frozen (`jaxcomm.training`).

    Attributes:
        edges: Weights of the edges (`Network.edges`).
        joints: Matrices that join edges (`Network.joints`).
    """

    edges: PyTree
    joints: PyTree

    def join(self, frozen: Network) -> Network:
        """Puts the wires into a network.

        Args:
            frozen: The network without wires, as `Network.split` returned it.

        Returns:
            The whole network.
        """
        return frozen.replace(edges=self.edges, joints=self.joints)


class Network(struct.PyTreeNode):
    """Weights and architecture of a network of language models (Wu et al. 2026, arXiv 2505.12741).

    `forward`, `generate`, agents and protocols accept it like `Params`.

    Attributes:
        models: The different models. Vertices with the same model share its weights.
        edges: Weights of every stack of edges, by its name (`NetworkConfig.stacks`). The arrays are [I, J, ...],
            float32. The edges are computed in the dtype of the vertices.
        joints: Matrices [J, D, n D] that join the n edges into each vertex, by group of vertices. Empty unless
            `config.aggregate` is "concat".
        config: The vertices and their connections.

    Example:
        >>> from jaxcomm.lmnet import init_network
        >>> network = init_network(jax.random.key(0), params, widths=(1, 2, 1), edge="linear")
        >>> sorted(network.edges)
        ['edge 0.0-0', 'edge 1.0-0']
    """

    models: tuple[Params, ...]
    edges: PyTree
    joints: PyTree
    config: NetworkConfig = struct.field(pytree_node=False)

    @property
    def dtype(self):
        """Dtype of the vertices' weights."""
        return self.models[0].dtype

    @property
    def embed(self):
        """Embedding matrix [V, D] of the vertex that reads the tokens."""
        return self.reader.embed

    @property
    def reader(self) -> Params:
        """The vertex that embeds the tokens."""
        return self.models[self.config.layers[0][0][0]]

    @property
    def writer(self) -> Params:
        """The vertex that has the head."""
        return self.models[self.config.layers[-1][0][0]]

    def split(self) -> tuple[Wires, Network]:
        """Separates the trainable wires from the frozen vertices.

        Returns:
            The wires, and the network without them.
        """
        return Wires(self.edges, self.joints), self.replace(edges={}, joints={})

    def empty_cache(self, batch: int, columns: int, *branches: int) -> KVCache:
        """Makes an empty cache for every vertex and every edge.

        Args:
            batch: Number of rows, B.
            columns: Number of tokens that it has room for, S.
            *branches: Number of branches, C, if there are any (`attention.Segment`).

        Returns:
            The cache. Its k and v are dicts by name. The first axes of their arrays are [M] for vertices and [I, J] for
            edges.
        """
        k, v = {}, {}
        for name, x in self.config.groups.items():
            cache = jax.eval_shape(lambda x=x: self.models[x.model].empty_cache(batch, columns, *branches))
            zeros = lambda tree, n=x.copies: jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), tree)
            k[name], v[name] = zeros(cache.k), zeros(cache.v)
        for name, (x, y) in self.config.stacks.items() if "attention" in edges.parts(self.config.edge) else ():
            c = edges.shape(self.models[x.model].config, self.config.edge)
            shape = (x.copies, y.copies, batch, c.kv_heads, *branches, columns, c.head_dim)
            k[name], v[name] = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return KVCache(k, v, jnp.full((batch, *branches, columns), -1, jnp.int32))

    def read(
        self,
        tokens: Int[AnyArray, "B T"] | Float[AnyArray, "B T D"],
        positions: Int[Array, "B T"],
        *,
        attended: Attended = ALONE,
        last: bool = False,
        training: Training = PLAIN,
        wire: Callable[[str, Array], Array] = lambda name, x: x,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Reads tokens through the whole network (`LanguageModel`).

        Args:
            tokens: Token ids [B, T], or vectors [B, T, D] in the place of their embeddings.
            positions: Positions [B, T]; -1 on padding.
            attended: Caches to attend to, and the cache to write.
            last: Return only the last token's stream, [B, 1, D].
            training: Settings of a pass for which a gradient is computed.
            wire: Function wire(name, x) of every output inside the network: of vertices [M, B, T, D], of edges
                [I, J, B, T, D]. Its result replaces the output. It acts only on the tokens of this pass: cached keys and
                values of earlier tokens do not change. Keys and values of this pass are computed from the replaced states.

        Returns:
            The stream [B, T, D] of the writing vertex before its final norm, and the cache, or None without one.
        """
        c, k, v, streams = self.config, {}, {}, {}
        x = embed(self.reader, tokens, positions)[None]
        for name, to in c.groups.items():
            if to.layer:
                ys = []
                for edge, (source, target) in c.stacks.items():
                    if target == to:
                        y, k[edge], v[edge] = self._edges(edge, streams[source], positions, attended, training)
                        ys.append(wire(edge, y))
                x = self._join(name, ys)
            end = to.layer == len(c.layers) - 1
            x, k[name], v[name] = self._vertices(name, x, positions, attended, training, last and end)
            normed = x if end or not c.norm else jax.vmap(functools.partial(final_norm, self.models[to.model]))(x)
            x = streams[to] = wire(name, normed)
        kept = lambda new: {name: a for name, a in new.items() if a is not None}
        cache = attended.cache
        return x[0], None if cache is None else cache.replace(k=kept(k), v=kept(v))

    def _vertices(
        self, name: str, x: Float[Array, "M B T D"], positions, attended: Attended, training: Training, last: bool
    ) -> tuple[Array, Any, Any]:
        """Run M vertices of one model in one batched call. Returns h[L], keys, values."""
        model, (M, B, *_) = self.models[self.config.groups[name].model], x.shape
        if attended.cache is None and not attended.past:
            # Merge vertices into the rows of one batch, B first, which a mesh divides. The weights' gradients are then plain
            # matrix products (`project`).
            rows = lambda a: jnp.repeat(a, M, axis=0)
            training = training._replace(documents=jax.tree.map(rows, training.documents))
            every = x.swapaxes(0, 1).reshape(B * M, *x.shape[2:])
            h, _, _ = run_blocks(model, every, rows(positions), last=last, training=training)
            return h.reshape(B, M, *h.shape[1:]).swapaxes(0, 1), None, None

        def run(x, past, cache):
            own = attended._replace(past=past, cache=cache)
            h, cache, _ = run_blocks(model, x, positions, attended=own, last=last, training=training)
            return h, cache and cache.k, cache and cache.v

        past, cache, axes = _parts(name, attended)
        return jax.vmap(run, in_axes=(0, *axes))(x, past, cache)

    def _edges(
        self, name: str, x: Float[Array, "I B T D"], positions, attended: Attended, training: Training
    ) -> tuple[Float[Array, "I J B T Y"], Any, Any]:
        """Run a stack of edges in one batched call. Returns the outputs, keys, values."""
        source, target = self.config.stacks[name]
        c, out = self.models[source.model].config, self.models[target.model].config.width
        shape = edges.shape(c, self.config.edge)
        edge, angles = edges.Edge(c, self.config.edge, out), angles_of(shape, rotary(shape, positions), 0)
        places, window = training.places(positions)

        def run(weights, x, past, cache):
            single = lambda cache: cache.replace(k=(cache.k,), v=(cache.v,))
            own = attended._replace(past=tuple(map(single, past)), cache=cache and single(cache))
            around = Surroundings(1, angles, places, window, own)
            x, weights = training.fetched(x, jax.tree.map(lambda w: w.astype(x.dtype), weights))
            y: Any = edge.apply({"params": weights}, x, around)
            return y, around.kept and around.kept.k[0], around.kept and around.kept.v[0]

        past, cache, axes = _parts(name, attended)
        targets = jax.vmap(training.checkpointed(run), in_axes=(0, None, *axes), axis_size=target.copies)
        return jax.vmap(targets, in_axes=(0, 0, *axes))(self.edges[name], x, past, cache)

    def _join(self, name: str, ys: Sequence[Float[Array, "_ J B T D"]]) -> Float[Array, "J B T D"]:
        """Aggregate all edges into a group of vertices to the vertices' inputs."""
        if self.config.aggregate == "concat":
            wide = [y.transpose(1, 2, 3, 0, 4).reshape(*y.shape[1:4], -1) for y in ys]
            every = jnp.concatenate(wide, axis=-1)
            return jnp.einsum("jbtx,jdx->jbtd", every, self.joints[name].astype(every.dtype))
        total = functools.reduce(jnp.add, [y.sum(axis=0) for y in ys])
        return total if self.config.aggregate == "sum" else total / jnp.asarray(sum(map(len, ys)), total.dtype)

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes logits from the result of `read`.

        Args:
            h: The writing vertex's stream before its final norm.

        Returns:
            Logits [B, T, V], float32.
        """
        return unembed(self.writer, h)


def _parts(name: str, attended: Attended) -> tuple[Any, Any, Any]:
    """The parts of the caches for a group of vertices or edges, and their vmap axes: separate keys, shared positions."""
    part = lambda c: KVCache(c.k[name], c.v[name], c.positions) if c and name in c.k else None
    mapped: Any = KVCache(0, 0, None)  # pyright: ignore[reportArgumentType] (axes, not arrays)
    own, before = part(attended.cache), tuple(held for c in attended.past if (held := part(c)))
    return before, own, ((mapped,) * len(before), mapped if own else None)


def init_network(
    key: Array,
    params: Params | Sequence[Params],
    widths: Sequence[int] = (1, 4, 4, 4, 1),
    *,
    edge: EdgeConfig | str = "block",
    aggregate: str = "sum",
    norm: bool = True,
) -> Network:
    """Connects models by new edges to form a network (Wu et al. 2026, arXiv 2505.12741).

    With "sum", each edge's initial scale is divided by the number of edges into its vertex. With "concat", the initial
    matrices compute the mean of the edges.

    Args:
        key: Random key for the edges.
        params: The model that all vertices share, or a list with one model for each vertex, layer by layer. A model
            that occurs twice in the list shares its weights.
        widths: Number of vertices of each layer. The first and the last are 1.
        edge: The kind of edge, by name ("block", "attention", "mlp", "linear", "identity") or as an `EdgeConfig`.
        aggregate: Input of a vertex: "sum", "mean" or "concat" of its edges. "concat" combines them with a matrix.
        norm: Whether interior vertices keep their model's final norm.

    Returns:
        The network.

    Raises:
        ValueError: `widths` does not begin and end with 1, or holds a 0; the numbers of models and vertices differ; the
            models have different vocabularies; "identity" edges connect different widths; a model has linear attention.

    Example:
        >>> from jaxcomm.lmnet import init_network
        >>> network = init_network(jax.random.key(0), params, widths=(1, 2, 1), edge="linear")
        >>> jc.forward(network, prompts).shape
        (2, 3, 256)
    """
    widths, count = tuple(widths), sum(widths)
    check_widths(widths)
    given = [params] * count if isinstance(params, Params) else list(params)
    if len(given) != count:
        raise ValueError(f"{len(given)} models for widths {widths}: give one, or one for each of {count} vertices")
    models: list[Params] = []
    for model in given:
        if not any(model is m for m in models):
            models.append(model)
    which = iter([next(i for i, m in enumerate(models) if m is model) for model in given])
    layers = []
    for width in widths:
        row = [next(which) for _ in range(width)]
        layers.append(tuple((m, row.count(m)) for m in dict.fromkeys(row)))
    edge = EdgeConfig(kind=edge) if isinstance(edge, str) else edge  # pyright: ignore[reportArgumentType]
    config = NetworkConfig(tuple(m.config for m in models), tuple(layers), edge, aggregate, norm)  # pyright: ignore[reportArgumentType]
    wires, joints = {}, {}
    for n, (name, (x, y)) in enumerate(config.stacks.items()):
        keys = jax.random.split(jax.random.fold_in(key, n), (x.copies, y.copies))
        wires[name] = _draw(keys, config.models[x.model], edge, config.models[y.model].width)
        if edge.scale is not None and aggregate == "sum":
            wires[name]["scale"] /= widths[x.layer]
    if aggregate == "concat":
        for name, y in list(config.groups.items())[1:]:
            n = widths[y.layer - 1]
            joints[name] = jnp.tile(jnp.eye(config.models[y.model].width), (y.copies, 1, n)) / n
    return Network(tuple(models), wires, joints, config)


@functools.partial(jax.jit, static_argnames=("model", "edge", "out"))
def _draw(keys: Key[Array, "I J"], model: ModelConfig, edge: EdgeConfig, out: int) -> Any:
    return jax.vmap(jax.vmap(lambda key: edges.init_edge(key, model, edge, out)))(keys)


def size(tree: Any) -> int:
    """Counts the parameters in a pytree of weights.

    Args:
        tree: Weights, or their shapes.

    Returns:
        The number of entries of all arrays.

    Example:
        >>> from jaxcomm.lmnet import size
        >>> size(params.embed)
        32768
    """
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
