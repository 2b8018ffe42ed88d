"""Pictures of sweeps: they can be drawn whatever was swept, and pages need nothing but themselves."""

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure

from jaxcomm.evals.figures import LayerMap, draw, edges, layer_maps, page


def layer_map(K: int, J: int, *, title: str = "Countries", scale: float = 1.0) -> LayerMap:
    """Random values [K, J] at every other layer from the second on; `best` is where they are greatest."""
    values = -3 + scale * np.random.default_rng(K * J).normal(size=(K, J))
    ks, js = range(2, 2 * K + 2, 2), range(2, 2 * J + 2, 2)
    k, j = divmod(int(values.argmax()), J)
    return LayerMap(title, values, ks, js, (ks[k], js[j]))


@pytest.mark.parametrize(
    "maps",
    [
        [layer_map(30, 30), layer_map(30, 30), layer_map(7, 6, title="two\nlines, $3 and $4")],
        [layer_map(1, 5)],
        [layer_map(5, 1)],
        [layer_map(1, 1)],
        [layer_map(4, 4, scale=0), layer_map(1, 5, scale=0)],
    ],
    ids=["30x30", "1x5", "5x1", "1x1", "all equal"],
)
@pytest.mark.parametrize("limits", [None, (-10.0, 5.0)])
@pytest.mark.parametrize("style", ["cells", "contours"])
def test_maps_are_a_png_whatever_was_swept(maps, limits, style):
    png = layer_maps(maps, label="log-probability", columns=2, limits=limits, style=style)
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("layers", [(2, 3, 4), (3, 6, 12)], ids=["neighbours", "some layers"])
def test_a_map_has_one_colour_for_each_pair_of_layers_unless_contours_are_asked_for(layers):
    values = np.arange(12.0).reshape(3, 4)
    made = LayerMap("Countries", values, layers, (1, 2, 4, 8), (layers[2], 8))
    norm = Normalize(0, 12)
    axis = Figure().subplots()
    draw(axis, made, norm)
    (cells,) = axis.collections
    assert isinstance(cells, QuadMesh)
    np.testing.assert_array_equal(cells.get_array(), values)
    np.testing.assert_array_equal(cells.get_coordinates()[:, 0, 1], edges(layers))
    np.testing.assert_array_equal(cells.get_coordinates()[0, :, 0], edges((1, 2, 4, 8)))
    axis = Figure().subplots()
    draw(axis, made, norm, np.linspace(0, 12, 7))
    assert [type(drawn) for drawn in axis.collections] == [QuadContourSet]


def test_a_page_needs_no_network_and_shows_its_texts_unchanged():
    maps = [layer_map(3, 4, title="Countries & cities"), layer_map(1, 1, title="Tip <b> sheets")]
    html = page("A < B", {"Maps <i>": ("per cent", maps[:1]), "Others": ("nats", maps)}, "k <script> & j")
    assert 'src="http' not in html and "<link" not in html
    assert "<h1>A &lt; B</h1>" in html and "<h2>Maps &lt;i&gt;</h2>" in html and "k &lt;script&gt; &amp; j" in html
    # plotly writes < and > inside its scripts as \u003c and \u003e.
    assert html.count("Countries &amp; cities") == 2 and "Tip &lt;b&gt; sheets" in html
    assert html.count(r"k = %{y}\u003cbr\u003ej = %{x}") == 3
    for value in maps[0].values.flat:
        assert str(float(value)) in html


def test_the_same_sweep_gives_the_same_page():
    groups = {"Countries": ("per cent", [layer_map(3, 4)] * 4)}
    assert page("title", groups, "text") == page("title", groups, "text")
