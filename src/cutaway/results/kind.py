"""What all result kinds share: labelled form, picture, page, terminal and files. A kind adds ``table`` and ``spec``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError, nearest
from cutaway.core.result import Result
from cutaway.core.result_file import to_json
from cutaway.results.drawing import shown

if TYPE_CHECKING:
    import pandas
    import xarray

PNG_SCALE = 2  # pixels per unit of the picture, for sharp text


class Kind(Result):
    """A result that can be tabled, drawn, printed and written."""

    def to_xarray(self) -> xarray.Dataset:
        """Every array with its dimensions and labels; unit, title and method as attributes."""
        import xarray

        dims, variables = self.dims(), {}
        for name, data in self.arrays().items():
            variables[name.rpartition("/")[2]] = (dims[name], data)
        attributes = {"title": self.title, "unit": self.unit, "method": self.made_by.method if self.made_by else ""}
        coordinates = {dim: list(names) for dim, names in self.labels.items() if dim not in variables}
        return xarray.Dataset(variables, coords=coordinates, attrs=attributes)

    def long_table(self, *names: str) -> pandas.DataFrame:
        """One row per cell of arrays with equal dimensions. A dimension with text labels gets a second column
        ``<dim>_index``, because tokens repeat."""
        import pandas

        arrays = self.arrays()
        dims, shape = self.dims()[names[0]], arrays[names[0]].shape
        table: dict[str, Any] = {}
        for dim, places in zip(dims, np.indices(shape), strict=True):
            labels = self.along(dim)
            if any(isinstance(each, str) for each in labels):
                table[f"{dim}_index"] = places.ravel()
            table[dim] = np.array(labels, dtype=object)[places.ravel()] if labels else places.ravel()
        for name in names:
            table[name] = arrays[name].ravel()
        return pandas.DataFrame(table).infer_objects()

    def highlights(self) -> pandas.DataFrame:
        """The rows of ``table()`` that a reader wants first."""
        return self.table()

    def caption(self) -> list[str]:
        """Lines under the title: how it was made, and whether its check and proof hold."""
        lines = []
        if self.made_by:
            lines.append(" · ".join(each for each in (self.made_by.method, self.made_by.model) if each))
        lines += [str(each) for each in (self.check, self.proof) if each is not None and not each.holds]
        return lines

    def option(self, name: str, value: Any, dim: str) -> int:
        """The index along ``dim`` that a picture's option names by label."""
        labels = self.along(dim)
        if value not in labels:
            listed = ", ".join(map(str, labels[:12])) + (" ..." if len(labels) > 12 else "")
            raise ResultError(
                f"{name}={value!r}", f"this {self.kind} has {listed}", nearest(str(value), map(str, labels))
            )
        return labels.index(value)

    def view(self, **options: Any) -> Any:
        """The picture as an altair chart; ``options`` as in ``spec``."""
        import altair

        spec = self.drawn(**options)
        # Altair checks data against its schema too, half a minute for 10,000 cells: it sees the first row only.
        rows = spec["data"]["values"]
        chart = altair.Chart.from_dict(spec | {"data": {"values": rows[:1]}})
        chart.data = altair.InlineData(values=rows)
        return chart

    def drawn(self, **options: Any) -> dict[str, Any]:
        """``spec(**options)``, with an error that names the options there are."""
        known = list(inspect.signature(self.spec).parameters)
        for name in options:
            if name not in known:
                found = f"the picture of a {self.kind} has {', '.join(known) or 'no options'}"
                raise ResultError(f"option {name!r}", found, nearest(name, known))
        return self.spec(**options)

    def summary(self) -> Any:
        from cutaway.results.terminal import summary

        return summary(self)

    def __rich__(self) -> Any:
        return self.summary()

    def page(self, **options: Any) -> str:
        """One self-contained HTML file as text; ``options`` as in ``spec``."""
        from cutaway.results.page import page

        return page(self, **options)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from cutaway.results.page import still_html, table_html

        return {
            "application/vnd.vegalite.v6.json": self.spec(),
            "text/plain": repr(self),
            # For notebooks that cannot draw Vega-Lite themselves; nothing is fetched for it.
            "text/html": still_html(_png(self)) + table_html(self.highlights()),
        }

    def write(self, path: str | Path, **options: Any) -> Path:
        path = Path(path)
        if path.name.endswith(FOREIGN):
            raise ResultError(f"writing {str(path)!r}", f"a {self.kind} has no such form", "only graphs have it")
        if path.suffix not in WRITERS:
            found = f"no writer for the suffix {path.suffix!r}"
            raise ResultError(f"writing {str(path)!r}", found, f"use one of {', '.join(WRITERS)}")
        data = WRITERS[path.suffix](self, **options)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise ResultError(f"writing {str(path)!r}", f"the disk refused ({error.strerror or error})") from error
        return path


def _png(result: Kind, **options: Any) -> bytes:
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(json.dumps(result.drawn(**options)), scale=PNG_SCALE))


def _svg(result: Kind, **options: Any) -> bytes:
    import vl_convert

    return str(vl_convert.vegalite_to_svg(json.dumps(result.drawn(**options)))).encode()


def _html(result: Kind, **options: Any) -> bytes:
    return result.page(**options).encode("utf-8", "backslashreplace")


def _csv(result: Kind, **options: Any) -> bytes:
    no_options(options, ".csv")
    return str(result.table().to_csv(index=False)).encode("utf-8", "backslashreplace")


def _json(result: Kind, **options: Any) -> bytes:
    no_options(options, ".json")
    return to_json(result).encode()


def no_options(options: dict[str, Any], suffix: str) -> None:
    """ResultError when a form that is no picture is asked for with a picture's options."""
    if options:
        raise ResultError(f"writing {suffix} with {', '.join(options)}", "it holds every number and no picture")


FOREIGN = (".circuit.json", ".attribution.json", ".pt")
"""Endings of the formats of others, which graphs alone are written in."""
WRITERS = {".html": _html, ".png": _png, ".svg": _svg, ".json": _json, ".csv": _csv}


def cell_text(value: Any, longest: int = 60) -> str:
    """One table cell for a reader."""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return shown(value, longest)
