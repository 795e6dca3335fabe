"""Kernel settings of the build: figures as SVG, without the date and the versions that would change their bytes."""

c = get_config()
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "metadata": {"Date": None, "Creator": None}}
