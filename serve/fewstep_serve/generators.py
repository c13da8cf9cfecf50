"""The generators as the HTTP side sees them: in replicas of their own, or in the process that answers HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle

from fewstep_serve.schema import ImageRequest, ImagesResponse, ModelEntry, OfferStatus, PreviewImage, Refusal

if TYPE_CHECKING:
    from fewstep_serve.generator import GeneratorReplica


class Generators(Protocol):
    """What HTTP asks of the generators. Cancelling a call stops the work for it."""

    @property
    def deployment_name(self) -> str:
        """Name of their deployment."""
        ...

    async def generate(self, request: ImageRequest) -> ImagesResponse | Refusal:
        """All images of a checked request."""
        ...

    def generate_stream(
        self, request: ImageRequest
    ) -> AsyncGenerator[PreviewImage | ImagesResponse | Refusal]:
        """Previews as they form, and at the end what `generate` gives."""
        ...

    async def models(self) -> list[ModelEntry]:
        """The models on offer."""
        ...

    async def offer_statuses(self) -> list[OfferStatus]:
        """Of each replica that answers, whether it serves what was configured last."""
        ...


class RemoteGenerators:
    """Generators in replicas of their own: each request goes to one of them.

    Args:
        handle: of their deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    @property
    def deployment_name(self) -> str:
        """Name of their deployment."""
        return self._handle.deployment_name

    async def generate(self, request: ImageRequest) -> ImagesResponse | Refusal:
        """All images of a checked request.

        Raises:
            RayActorError, ReplicaUnavailableError: the replica died.
            BackPressureError, DeploymentUnavailableError: no replica takes it.
        """
        response = self._handle.generate.remote(request)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # Ray would let the generator go on
            raise

    async def generate_stream(
        self, request: ImageRequest
    ) -> AsyncGenerator[PreviewImage | ImagesResponse | Refusal]:
        """Previews as they form, and at the end what `generate` gives.

        Raises:
            RayActorError, ReplicaUnavailableError: the replica died.
            BackPressureError, DeploymentUnavailableError: no replica takes it.
        """
        stream: Any = self._handle.options(stream=True).generate_stream.remote(request)
        try:
            async for message in stream:
                yield message
        finally:
            stream.cancel()

    async def models(self) -> list[ModelEntry]:
        """The models on offer.

        Raises:
            RayActorError, ReplicaUnavailableError: the replica died.
            BackPressureError, DeploymentUnavailableError: no replica takes the question.
        """
        return await self._handle.models.remote()

    async def offer_statuses(self) -> list[OfferStatus]:
        """Of each replica that answers, whether it serves what was configured last.

        Raises:
            DeploymentUnavailableError: the deployment failed.
        """
        return await _offer_statuses(self._handle)


class OwnGenerator:
    """The generator of this very process: requests go the way of a function call.

    Args:
        replica: the generator.
    """

    def __init__(self, replica: GeneratorReplica) -> None:
        self._replica = replica

    @property
    def deployment_name(self) -> str:
        """Name of its deployment."""
        return serve.get_replica_context().deployment

    async def generate(self, request: ImageRequest) -> ImagesResponse | Refusal:
        """All images of a checked request."""
        return await self._replica.generate(request)

    def generate_stream(
        self, request: ImageRequest
    ) -> AsyncGenerator[PreviewImage | ImagesResponse | Refusal]:
        """Previews as they form, and at the end what `generate` gives."""
        return self._replica.generate_stream(request)

    async def models(self) -> list[ModelEntry]:
        """The models on offer."""
        return await self._replica.models()

    async def offer_statuses(self) -> list[OfferStatus]:
        """Of each replica that answers, whether it serves what was configured last.

        Raises:
            DeploymentUnavailableError: the deployment failed.
        """
        context = serve.get_replica_context()
        return await _offer_statuses(serve.get_deployment_handle(context.deployment, context.app_name))


async def _offer_statuses(handle: DeploymentHandle) -> list[OfferStatus]:
    # Of every replica: one may have what another can't load. What died meanwhile gives an exception.
    answers = await handle.broadcast("offer_status").results_async(return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, OfferStatus)]
