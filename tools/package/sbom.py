"""Writes what the program is made of as a CycloneDX 1.5 document, from Cargo.lock and `cargo metadata` alone.

Crates that only build other crates (build scripts, procedural macros) are listed too, with the scope "excluded". The document is
a function of the tree: no serial number, no time but the one that is given.
"""

import json
import subprocess
import tomllib
from pathlib import Path

TARGET = "x86_64-unknown-linux-gnu"


def metadata(repository: Path) -> dict:
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", TARGET]
    return json.loads(subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout)


def reached(nodes: dict, root: str, kinds: set) -> list[str]:
    """Returns the packages that the root needs through dependencies of these kinds, itself included."""
    seen, todo = [root], [root]
    while todo:
        for dependency in nodes[todo.pop()]["deps"]:
            fits = any(kind["kind"] in kinds for kind in dependency["dep_kinds"])
            if fits and dependency["pkg"] not in seen:
                seen.append(dependency["pkg"])
                todo.append(dependency["pkg"])
    return seen


def is_macro(package: dict) -> bool:
    return any("proc-macro" in target["kind"] for target in package["targets"])


def component(package: dict, checksums: dict, linked: bool) -> dict:
    name, version = package["name"], package["version"]
    entry = {"type": "library", "bom-ref": purl(package), "name": name, "version": version,
             "scope": "required" if linked else "excluded", "purl": purl(package)}
    checksum = checksums.get((name, version))
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package["license"]:
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if package["repository"]:
        entry["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return entry


def purl(package: dict) -> str:
    return f"pkg:cargo/{package['name']}@{package['version']}"


def sbom(repository: Path, time: str) -> dict:
    told = metadata(repository)
    packages = {package["id"]: package for package in told["packages"]}
    nodes = {node["id"]: node for node in told["resolve"]["nodes"]}
    root = told["resolve"]["root"]
    lock = tomllib.loads((repository / "Cargo.lock").read_text())
    checksums = {(p["name"], p["version"]): p.get("checksum") for p in lock["package"]}
    # What a procedural macro needs runs in the compiler, never in the program.
    own = {id: {**node, "deps": [] if is_macro(packages[id]) else node["deps"]} for id, node in nodes.items()}
    linked = {id for id in reached(own, root, {None}) if not is_macro(packages[id])}
    everything = sorted(reached(nodes, root, {None, "build"}), key=lambda id: purl(packages[id]))
    needs = lambda id: sorted({purl(packages[d["pkg"]]) for d in nodes[id]["deps"] if d["pkg"] in everything})
    taod = component(packages[root], checksums, True)
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"timestamp": time, "component": {**taod, "type": "application"}},
        "components": [component(packages[id], checksums, id in linked) for id in everything if id != root],
        "dependencies": [{"ref": purl(packages[id]), "dependsOn": needs(id)} for id in everything],
    }
