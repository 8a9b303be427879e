"""``hdb ui``: the calls of the public API on a page, by Gradio, which is imported when the page is built."""
