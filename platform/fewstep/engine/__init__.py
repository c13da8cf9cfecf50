"""Generation as a service needs it, without HTTP and without Ray.

`models.ModelStore` holds models by name, `engine.Engine` makes images in batches of whatever may share one
(`batcher.DynamicBatcher`), `source.ModelSource` says where a model lies.
"""
