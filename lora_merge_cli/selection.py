"""What ``--include`` and ``--exclude`` choose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_merge_cli.dialects import Dialect
from lora_merge_cli.errors import UsageError
from lora_merge_cli.records import AdapterSite, Dropped, KeyPath, Replacement, Survey, display, glob_matches


@dataclass(frozen=True)
class Selection:
    """What is merged, and what is left out."""

    sites: tuple[AdapterSite, ...]
    replacements: tuple[Replacement, ...]
    excluded_sites: tuple[AdapterSite, ...]
    excluded_replacements: tuple[Replacement, ...]

    def __bool__(self) -> bool:
        """Whether anything is merged."""
        return bool(self.sites or self.replacements)

    @property
    def excluded(self) -> int:
        """How many sites and replacements are left out."""
        return len(self.excluded_sites) + len(self.excluded_replacements)

    @property
    def dropped(self) -> list[Dropped]:
        """The adapter leaves that are left out."""
        used = {(site.adapter, factor.path) for site in self.sites for factor in site.factors.values()}
        used |= {(found.adapter, found.path) for found in self.replacements}
        left = {
            **{(site.adapter, factor.path): None for site in self.excluded_sites for factor in site.factors.values()},
            **{(found.adapter, found.path): None for found in self.excluded_replacements},
        }
        reason = "left out by --include or --exclude"
        return [Dropped(path, reason, adapter) for adapter, path in left if (adapter, path) not in used]


def select(dialect: Dialect, survey: Survey, include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """What `--include` and `--exclude` choose of the sites and replacements.

    Raises:
        UsageError: A glob matches none.
    """
    names: dict[KeyPath, tuple[KeyPath, ...]] = {
        found.target: leaf_names(dialect, found.target) for found in survey.replacements
    }
    names |= {site.targets[0]: site_names(dialect, site) for site in survey.sites}
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if names and not any(matches_any(found, (pattern,)) for found in names.values()):
                raise UsageError(
                    f"{flag} {pattern!r} matches no site",
                    expected=f"a glob for names such as {display(next(iter(names.values()))[-1])}",
                )

    def wanted(target: KeyPath) -> bool:
        included = not include or matches_any(names[target], include)
        return included and not matches_any(names[target], exclude)

    return Selection(
        tuple(site for site in survey.sites if wanted(site.targets[0])),
        tuple(found for found in survey.replacements if wanted(found.target)),
        tuple(site for site in survey.sites if not wanted(site.targets[0])),
        tuple(found for found in survey.replacements if not wanted(found.target)),
    )


def matches_any(names: Iterable[KeyPath], patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a name, or the end of one from some separator on."""
    spellings = [spelled for pattern in patterns for spelled in (pattern, f"**/{pattern}")]
    return any(glob_matches(name, spelled) for name in names for spelled in spellings)


def leaf_names(dialect: Dialect, target: KeyPath) -> tuple[KeyPath, ...]:
    """What a leaf may be called: its path, that without what all paths share, and its module."""
    canonical = dialect.canonical(target)
    return target, canonical, (*canonical[:-1], str(canonical[-1]).removesuffix(".weight"))


def site_names(dialect: Dialect, site: AdapterSite) -> tuple[KeyPath, ...]:
    """What a site may be called: its kernel's full path, that without what all paths share, and its label."""
    return site.targets[0], dialect.canonical(site.targets[0]), (site.label,)
