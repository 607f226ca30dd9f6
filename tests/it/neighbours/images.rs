//! Mutated images are pulled, walked, read and removed while a good image is read beside them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{FileExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use nydus_rafs::metadata::RafsVersion;
use nydus_store::{
    fixtures::{
        self, BuildOptions, BuiltImage, Conversion, LayerSource,
        content::{Random, mixed},
        image::{BlobKind, MEDIA_TYPE_MANIFEST},
    },
    internals::Digest,
};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use serde_json::Value;
use tempfile::TempDir;

use super::Ends;
use crate::common::{BINARY, Lab, Sample, Serve, StoreLayer, bootstrap_layer};

/// Number of mutated images. For more, change the number and run
/// `cargo test --test it neighbours::images -- --nocapture`; 10,000 take about half an hour.
const MUTATIONS: usize = 300;
/// Number of images that are there at a time.
const BATCH: usize = 50;
/// Pause between two reads of the good image, which leaves time for the others.
const PAUSE: Duration = Duration::from_millis(20);
/// Time that is a hang, whatever the machine is busy with.
const HANG: Duration = Duration::from_secs(60);
/// Most of a file that is read from its start, in bytes.
const READ_LIMIT: u64 = 1 << 20;
/// Size of the root's file system, in bytes.
const DISK: u64 = 2 << 30;
/// Most that the daemon's memory may grow after the first batch, in bytes. Trees stay loaded for five minutes.
const GROWTH: u64 = 64 << 20;
/// Most warnings and errors with the name of one image: that it cannot be published, or not read.
const LINES: usize = 2;

/// What of an image is changed.
#[derive(Debug, Clone, Copy)]
enum Part {
    Bootstrap,
    Meta,
    Data,
}

/// A well-formed image to be changed.
struct Original {
    image: BuiltImage,
    boot: Vec<u8>,
    /// Blob metas in the bootstrap layer, by blob id.
    metas: BTreeMap<String, Vec<u8>>,
    /// Bytes of the layers below the bootstrap layer.
    data: Vec<Vec<u8>>,
    _dir: TempDir,
}

/// A changed image whose digests are right, except those of chunks.
struct Mutant {
    layers: Vec<(Digest, Vec<u8>)>,
    manifest: Value,
    config: Vec<u8>,
}

/// A few files of all kinds.
fn make_tree(dir: &Path) {
    let mut random = Random::new(7);
    for (name, len) in [
        ("one", 1),
        ("page", 4096),
        ("many/a", 50_000),
        ("many/b", 20_000),
        ("deep/er/empty", 0),
    ] {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, mixed(len, &mut random)).unwrap();
    }
    fs::hard_link(dir.join("page"), dir.join("many/same")).unwrap();
    symlink("../one", dir.join("many/link")).unwrap();
    xattr::set(dir.join("one"), "user.note", b"value").unwrap();
    mknodat(CWD, dir.join("deep/fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    mknodat(
        CWD,
        dir.join("deep/null"),
        FileType::CharacterDevice,
        Mode::RWXU,
        makedev(1, 3),
    )
    .unwrap();
}

impl Original {
    fn new(options: &BuildOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        make_tree(&tree);
        let layers = [LayerSource::Dir(tree)];
        let image = fixtures::build(&layers, options, &dir.path().join("image")).unwrap();
        let meta = |id: &String| {
            let path = dir.path().join("image/metas").join(format!("{id}.blob.meta"));
            Some((id.clone(), fs::read(path).ok()?))
        };
        let data = image.blobs.iter().filter(|blob| blob.kind != BlobKind::Bootstrap);
        Self {
            boot: fs::read(image.bootstrap_path().unwrap()).unwrap(),
            metas: match options.keep_meta {
                true => image.blob_ids.iter().filter_map(meta).collect(),
                false => BTreeMap::new(),
            },
            data: data.map(|blob| fs::read(&blob.path).unwrap()).collect(),
            image,
            _dir: dir,
        }
    }

    fn mutate(&self, part: Part, random: &mut Random) -> Mutant {
        let (mut boot, mut metas, mut data) = (self.boot.clone(), self.metas.clone(), self.data.clone());
        match part {
            Part::Meta if !metas.is_empty() => {
                let number = random.below(metas.len() as u64) as usize;
                damage(metas.values_mut().nth(number).unwrap(), random);
            }
            Part::Data => {
                let number = random.below(data.len() as u64) as usize;
                let old = Digest::of(&data[number]).hex();
                damage(&mut data[number], random);
                let new = Digest::of(&data[number]).hex();
                replace(&mut boot, old.as_bytes(), new.as_bytes());
                metas = metas
                    .into_iter()
                    .map(|(id, meta)| (id.replace(&old, &new), meta))
                    .collect();
            }
            Part::Bootstrap | Part::Meta => damage(&mut boot, random),
        }
        self.pack(&boot, &metas, data)
    }

    /// The image with these parts.
    fn pack(&self, boot: &[u8], metas: &BTreeMap<String, Vec<u8>>, data: Vec<Vec<u8>>) -> Mutant {
        let names: Vec<_> = metas.keys().map(|id| format!("image/{id}.blob.meta")).collect();
        let mut entries = vec![("image/image.boot", boot)];
        entries.extend(names.iter().map(String::as_str).zip(metas.values().map(Vec::as_slice)));
        let (layer, diff_id) = bootstrap_layer(&entries);
        let mut manifest: Value = serde_json::from_slice(&self.image.manifest).unwrap();
        let mut config: Value = serde_json::from_slice(&self.image.config).unwrap();
        let mut layers: Vec<_> = data.into_iter().map(|bytes| (Digest::of(&bytes), bytes)).collect();
        let diff_ids = config["rootfs"]["diff_ids"].as_array_mut().unwrap();
        for (blob, ((digest, _), id)) in self.image.blobs.iter().zip(layers.iter().zip(diff_ids.iter_mut())) {
            // A RAFS blob is its own uncompressed form.
            if blob.diff_id == blob.digest {
                *id = digest.to_string().into();
            }
        }
        *diff_ids.last_mut().unwrap() = diff_id.to_string().into();
        layers.push((Digest::of(&layer), layer));
        for (described, (digest, bytes)) in manifest["layers"].as_array_mut().unwrap().iter_mut().zip(&layers) {
            described["digest"] = digest.to_string().into();
            described["size"] = bytes.len().into();
        }
        let config = serde_json::to_vec(&config).unwrap();
        manifest["config"]["digest"] = Digest::of(&config).to_string().into();
        manifest["config"]["size"] = config.len().into();
        Mutant {
            layers,
            manifest,
            config,
        }
    }
}

impl Mutant {
    fn add_to(&self, lab: &Lab, repository: &str) {
        let manifest = serde_json::to_vec(&self.manifest).unwrap();
        lab.registry
            .add_manifest(repository, Some("1"), MEDIA_TYPE_MANIFEST, manifest);
        for (digest, bytes) in &self.layers {
            lab.registry.add_blob(repository, *digest, bytes.clone().into());
        }
        let config = Digest::of(&self.config);
        lab.registry.add_blob(repository, config, self.config.clone().into());
    }

    fn remove_from(&self, lab: &Lab, repository: &str) {
        for (digest, _) in &self.layers {
            lab.registry.remove_blob(repository, *digest);
        }
    }
}

/// Overwrites a few bytes, mostly non-zero ones, with values that are likely to break a parser.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    let mut below = |bound: usize| random.below(bound as u64) as usize;
    for _ in 0..=below(3) {
        let at = match below(4) {
            0 => below(2048.min(bytes.len())),
            _ => {
                let from = below(bytes.len());
                (from..bytes.len()).find(|&at| bytes[at] != 0).unwrap_or(from)
            }
        };
        match below(6) {
            0 => bytes[at] ^= 1 << below(8),
            1 => bytes[at] = below(256) as u8,
            2 => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
            3 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0),
            4 => {
                let (from, len) = (below(bytes.len()), 1 + below(64));
                let part: Vec<u8> = bytes[from..].iter().copied().take(len).collect();
                bytes[at..].iter_mut().zip(part).for_each(|(byte, new)| *byte = new);
            }
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
    }
    if below(20) == 0 {
        bytes.truncate(1 + below(bytes.len()));
    }
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    for at in 0..=bytes.len().saturating_sub(from.len()) {
        if bytes[at..].starts_with(from) {
            bytes[at..at + to.len()].copy_from_slice(to);
        }
    }
}

/// What was found in an image.
#[derive(Debug, Default, Clone, Copy)]
struct Found {
    entries: usize,
    read: usize,
    failed: usize,
}

/// Looks at all of an image.
fn walk(dir: &Path) -> Found {
    let mut found = Found::default();
    for entry in walkdir::WalkDir::new(dir) {
        found.entries += 1;
        let Ok(entry) = entry else {
            found.failed += 1;
            continue;
        };
        xattr::list(entry.path()).map(Iterator::count).ok();
        fs::read_link(entry.path()).ok();
        // Devices and fifos are not opened: a fifo waits for a writer.
        if entry.file_type().is_file() {
            match read(entry.path()) {
                Ok(()) => found.read += 1,
                Err(_) => found.failed += 1,
            }
        }
    }
    found
}

/// Reads the beginning and the end of a file.
fn read(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    file.read_at(&mut [0; 4096], file.metadata()?.len().saturating_sub(4096))?;
    file.take(READ_LIMIT).read_to_end(&mut Vec::new()).map(drop)
}

/// [`walk`] in a thread of its own; panics if it does not end.
fn walk_in_time(repository: &str, dir: PathBuf) -> Found {
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || done.send(walk(&dir)));
    let found = outcome.recv_timeout(HANG);
    found.unwrap_or_else(|error| panic!("{repository} hangs: {error}"))
}

/// Directories with the files of the registered images, by name.
fn registered(lab: &Lab) -> BTreeMap<String, PathBuf> {
    let images = fs::read(lab.serve.store().join("overlay-images/images.json")).unwrap();
    let images: Vec<Value> = serde_json::from_slice(&images).unwrap();
    let named = images.iter().flat_map(|image| {
        let diff = lab.serve.overlay().join(image["layer"].as_str().unwrap()).join("diff");
        let names = image["names"].as_array().unwrap().iter();
        names.map(move |name| (name.as_str().unwrap().to_owned(), diff.clone()))
    });
    named.collect()
}

/// Numbers of what happened to the mutated images.
#[derive(Debug, Default)]
struct Outcomes {
    published: usize,
    /// Published images of which something could not be read.
    with_errors: usize,
    entries: usize,
    failed: usize,
    slowest: Duration,
}

/// Pulls, reads and removes the images.
fn run_batch(lab: &Lab, batch: &[(String, Mutant)], outcomes: &mut Outcomes) {
    for (repository, mutant) in batch {
        mutant.add_to(lab, repository);
    }
    let references: Vec<_> = batch.iter().map(|(repository, _)| lab.reference(repository)).collect();
    let nydus_store = |command: &str, references: &[&String]| {
        let mut command_line = Command::new(BINARY);
        command_line
            .arg(command)
            .args(references)
            .arg("--root")
            .arg(lab.serve.root());
        command_line.output().unwrap()
    };
    let pulled = nydus_store("pull", &references.iter().collect::<Vec<_>>());
    assert!(pulled.status.code().is_some(), "{pulled:?}");
    let registered = registered(lab);
    let published: Vec<_> = references
        .iter()
        .filter(|name| registered.contains_key(*name))
        .collect();
    for name in &published {
        let start = Instant::now();
        let found = walk_in_time(name, registered[*name].clone());
        outcomes.entries += found.entries;
        outcomes.failed += found.failed;
        outcomes.with_errors += usize::from(found.failed > 0);
        outcomes.slowest = outcomes.slowest.max(start.elapsed());
    }
    outcomes.published += published.len();
    if !published.is_empty() {
        let removed = nydus_store("rm", &published);
        assert!(removed.status.success(), "{removed:?}");
    }
    for (repository, mutant) in batch {
        mutant.remove_from(lab, repository);
    }
    lab.registry.reset();
}

/// Reads the good image again and again while `work` runs; returns how often.
fn beside_reader(good: &Sample, layer: &StoreLayer, work: impl FnOnce()) -> usize {
    let (is_over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                good.drop_pages(layer);
                good.check(layer);
                rounds.fetch_add(1, Ordering::Relaxed);
                thread::sleep(PAUSE);
            }
        });
        let _ends = Ends(&is_over);
        work();
    });
    rounds.into_inner()
}

/// Kinds of images to change.
fn originals() -> Vec<Original> {
    let plain = BuildOptions {
        chunk_size: 4096,
        ..BuildOptions::default()
    };
    let version_5 = BuildOptions {
        version: RafsVersion::V5,
        chunk_size: 4096,
        ..BuildOptions::default()
    };
    let batches = |keep_meta| BuildOptions {
        chunk_size: 64 << 10,
        batch_size: 16 << 10,
        keep_meta,
        ..BuildOptions::default()
    };
    let zran = BuildOptions {
        conversion: Conversion::Zran,
        chunk_size: 64 << 10,
        ..BuildOptions::default()
    };
    [plain, version_5, batches(true), batches(false), zran]
        .iter()
        .map(Original::new)
        .collect()
}

/// The images, the same ones each time.
fn mutants(originals: &[Original]) -> impl Iterator<Item = (String, Mutant)> {
    let parts = [Part::Bootstrap, Part::Bootstrap, Part::Meta, Part::Data];
    (0..MUTATIONS).map(move |number| {
        let mut random = Random::new(number as u64 + 1);
        let original = &originals[number % originals.len()];
        let mutant = original.mutate(parts[number / originals.len() % parts.len()], &mut random);
        (format!("bad{number:05}"), mutant)
    })
}

#[test]
fn mutated_images_affect_no_other_image() {
    // In memory, where syncs take no time.
    let mut serve = Serve::prepare_on_tmpfs("", DISK);
    serve.launch();
    let lab = Lab::with_daemon(serve);
    let good = Sample::new(1);
    let good_layer = lab.add(&good, "good");
    good.check(&good_layer);
    let process = lab.serve.id();
    let originals = originals();
    for (number, original) in originals.iter().enumerate() {
        let unchanged = original.pack(&original.boot, &original.metas, original.data.clone());
        let mut outcomes = Outcomes::default();
        run_batch(&lab, &[(format!("unchanged{number}"), unchanged)], &mut outcomes);
        assert_eq!(
            (outcomes.published, outcomes.failed),
            (1, 0),
            "{number}: {}",
            lab.serve.log()
        );
    }
    let mut outcomes = Outcomes::default();
    let mut before = None;
    let (start, mut mutants) = (Instant::now(), mutants(&originals));
    let rounds = beside_reader(&good, &good_layer, || {
        loop {
            let batch: Vec<_> = mutants.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            run_batch(&lab, &batch, &mut outcomes);
            before.get_or_insert_with(|| lab.serve.resident_bytes());
        }
    });
    lab.nydus_store(&["gc"]);
    let (before, after) = (before.unwrap(), lab.serve.resident_bytes());
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "{MUTATIONS} images in {:?}, {rounds} reads of the good image: {outcomes:?}; {} MiB, then {} MiB",
        start.elapsed(),
        mib(before),
        mib(after)
    );
    good.check(&good_layer);
    assert!(
        outcomes.published > MUTATIONS / 10 && outcomes.published < MUTATIONS,
        "{outcomes:?}"
    );
    assert!(
        outcomes.with_errors > MUTATIONS / 50 && rounds > 0,
        "{outcomes:?}, {rounds}"
    );
    assert!(after < before + GROWTH, "{before}, then {after}");
    assert!(lab.serve.is_running() && lab.serve.id() == process && lab.serve.times_served() == 1);
    assert_eq!(registered(&lab).len(), 0);
    check_log(&lab.serve.log());
}

/// Panics if a mutated image has led to a panic, or to more than [`LINES`] warnings and errors.
fn check_log(log: &str) {
    assert!(!log.contains("panicked"), "{log}");
    let (mut by_image, mut others) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<_, usize>::new());
    for line in log
        .lines()
        .filter(|line| line.contains(" WARN ") || line.contains("ERROR "))
    {
        match line.split("/bad").nth(1).and_then(|rest| rest.get(..5)) {
            Some(number) => by_image.entry(number).or_default().push(line),
            None => *others.entry(line.get(28..110).unwrap_or(line)).or_default() += 1,
        }
    }
    println!("lines of {} images; others: {others:#?}", by_image.len());
    for (number, lines) in by_image {
        assert!(lines.len() <= LINES, "{number}: {lines:#?}");
    }
}
