"""The documentation as a static site: `make docs` builds it into docs/_build and fails on every broken link, anchor or image."""

project = "igpo_megatron"
author = copyright = "the igpo_megatron contributors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "igpo_megatron"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_use_index = False
html_last_updated_fmt = None
nitpicky = True

# Anchors as on GitHub, so that a link works in both.
myst_heading_anchors = 4
myst_links_external_new_tab = False
