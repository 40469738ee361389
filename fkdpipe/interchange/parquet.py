"""Export a store's labels as one Parquet table with a row per crop, for analysis.

Columns: key, class (of the folder, -1 without), image_height, image_width, crop, top, left,
height, width (pixels of the decoded image), flip, jitter (brightness, contrast, saturation, hue;
null without recorded jitter), ids and prob (lists of K, most probable first).
How the labels were made is recorded as JSON under `fkdpipe` in the table's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fkdpipe.common.errors import UsageError
from fkdpipe.common.progress import Reporter, silent
from fkdpipe.interchange import exporting
from fkdpipe.interchange.exporting import Export, Exported, ExportSettings, Labelled
from fkdpipe.storage.store import Store


def write_labels(
    store: Store, out: Path, settings: ExportSettings, *, reporter: Reporter = silent
) -> Exported:
    """Write `out/labels.parquet`, with one row group per unit.

    Raises:
        UsageError: pyarrow is not installed.
        LabelsError: `out` is not empty.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow: pip install 'fkdpipe[parquet]'.") from error
    export = Export(store, settings)
    root = exporting.empty_folder(out)
    facts = {
        "settings": export.settings.to_json(),
        "crops": export.finished.crops[0].part.settings.to_json(),
        "class_names": list(store.images.class_names),
    }
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("class", pa.int32()),
            ("image_height", pa.uint16()),
            ("image_width", pa.uint16()),
            ("crop", pa.int32()),
            ("top", pa.uint16()),
            ("left", pa.uint16()),
            ("height", pa.uint16()),
            ("width", pa.uint16()),
            ("flip", pa.bool_()),
            # not of a fixed size: pyarrow before 26 cannot read such lists where they are null
            ("jitter", pa.list_(pa.float32())),
            ("ids", pa.list_(pa.int32(), export.keep)),
            ("prob", pa.list_(pa.float32(), export.keep)),
        ],
        metadata={"fkdpipe": json.dumps(facts)},
    )
    with (
        reporter.task("export", store.num_images, "images") as advance,
        pq.ParquetWriter(root / "labels.parquet", schema, compression="zstd") as writer,
    ):
        for unit in export.units(advance):
            lists = {"ids": unit.ids_IMK.astype(np.int32), "prob": unit.prob_IMK}
            if unit.jitter_IM4 is not None:
                lists["jitter"] = unit.jitter_IM4
            nothing = pa.nulls(unit.flip_IM.size, schema.field("jitter").type)
            columns = (
                {"jitter": nothing}
                | _columns(store, unit)
                | {
                    name: pa.FixedSizeListArray.from_arrays(
                        pa.array(values.ravel()), values.shape[-1]
                    ).cast(schema.field(name).type)
                    for name, values in lists.items()
                }
            )
            writer.write_table(pa.table([columns[n] for n in schema.names], schema=schema))
    return Exported(len(export.finished.rows), 1, tuple(export.notes()))


def _columns(store: Store, unit: Labelled) -> dict[str, np.ndarray]:
    """All columns but the labels, one value per crop."""
    images, M = unit.flip_IM.shape
    box = unit.box_IM4.reshape(-1, 4)
    return {
        "key": np.repeat(np.array(unit.keys, dtype=object), M),
        "class": np.repeat(store.images.class_N[unit.rows], M),
        "image_height": np.repeat(unit.size_I2[:, 0], M),
        "image_width": np.repeat(unit.size_I2[:, 1], M),
        "crop": np.tile(np.arange(M, dtype=np.int32), images),
        **{name: box[:, k] for k, name in enumerate(("top", "left", "height", "width"))},
        "flip": unit.flip_IM.ravel(),
    }
