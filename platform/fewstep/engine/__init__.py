"""Generation as a service needs it, without HTTP and without Ray.

`models.ModelStore` keeps models by name, `generation.Generation` is one image that is asked for, `engine.Engine` turns
generations into images and batches those that can share a network evaluation (`batcher.DynamicBatcher`), and
`source.ModelSource` says where a model lies.
"""
