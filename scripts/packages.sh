# Functions that install missing Debian packages. Sourced by the other scripts.

# Build dependencies: a C compiler, and the build tools of the bundled C libraries (OpenSSL, zlib-ng, zstd, lz4).
BUILD_PACKAGES="gcc g++ libc6-dev make cmake perl"
# Test dependencies: Podman and related programs, a registry, a caching proxy, a static program to run in containers,
# debootstrap for scripts/podman-trees, and strace to record what is written.
TEST_PACKAGES="podman runc conmon uidmap skopeo buildah docker-registry nginx-light busybox-static debootstrap strace"

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if ! command -v apt-get >/dev/null; then
        echo "apt-get not found; install the equivalents of:$missing" >&2
        return 0
    fi
    echo "Installing:$missing" >&2
    as_root apt-get update -q
    # shellcheck disable=SC2086 # the list is to be split
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
}

# Prints the Debian mirror of this machine's apt, if it has one.
debian_mirror() {
    command -v apt-get >/dev/null || return 0
    targets='$(CREATED_BY) $(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)'
    apt-get indextargets --format "$targets" | sed -n 's/^Packages Debian Debian main //p' | grep '^[a-z]*:/' | head -n 1
}
