"""Hugging Face's hub: a Glow with push_to_hub, whose from_pretrained takes a repository's name, too."""

from pathlib import Path

from huggingface_hub import PyTorchModelHubMixin, snapshot_download

from flowkern import saving
from flowkern.glow import OPTIONS, Glow


class HubGlow(PyTorchModelHubMixin, Glow):
    """A Glow that the hub keeps as the folder that `Glow.save_pretrained` writes.

    The mixin alone, in front of Glow, would fill what it loads as far as names agree: networks of one's own would be
    new ones, and double precision single. from_pretrained(name or folder, network=None, **options): `network` and
    `options` as for `Glow.from_pretrained`, which says what it raises; revision, token and the like as for the mixin.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        saving.write(save_directory, self, self.config)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **arguments
    ) -> "HubGlow":
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        how = {name: arguments.pop(name) for name in names}
        wanted = [saving.WEIGHTS, saving.CONFIG]
        folder = model_id if Path(model_id).is_dir() else snapshot_download(model_id, allow_patterns=wanted, **how)
        # The mixin adds what the configuration says, which Glow reads itself; "custom" stands there for a network.
        options = {name: value for name, value in arguments.items() if name in OPTIONS}
        network = arguments.get("network")
        loaded = Glow.from_pretrained.__func__(cls, folder, network if callable(network) else None, **options)
        return loaded.to(map_location)
