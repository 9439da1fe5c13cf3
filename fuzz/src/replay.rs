//! The fuzz targets as ordinary tests: on the committed seeds, on seeds with changed bytes, and on random bytes.

use std::fs;
use std::path::Path;

use pcae_kernel::config::Target;

/// SplitMix64 (Steele et al., 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let mut seeds: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"seed-"))
        })
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "no seeds in {}", folder.display());
    seeds
        .iter()
        .map(|path| fs::read(path).expect("a readable seed"))
        .collect()
}

fn replay(name: &str, target: fn(&[u8]), rounds: usize) {
    let seeds = seeds(name);
    seeds.iter().for_each(|seed| target(seed));
    let mut random = Random(7);
    for _ in 0..rounds {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(4) {
            if !bytes.is_empty() {
                let at = random.below(bytes.len());
                bytes[at] = random.next() as u8;
            }
        }
        target(&bytes);
        bytes.truncate(random.below(bytes.len() + 1));
        target(&bytes);
        let bytes: Vec<u8> = (0..random.below(512))
            .map(|_| random.next() as u8)
            .collect();
        target(&bytes);
    }
}

#[test]
fn masking_selection() {
    replay("masking_selection", crate::masking_selection, 5000);
}

#[test]
fn config() {
    replay("config", crate::config, 20_000);
}

#[test]
fn checkpoint() {
    replay("checkpoint", crate::checkpoint, 2000);
}

#[test]
fn idx() {
    replay("idx", crate::idx, 5000);
}

/// The header that takes most memory for its length, just after its buffer has doubled.
#[test]
fn a_header_of_zeros_takes_bounded_memory() {
    let zeros = ["0"; (1 << 18) + 1].join(",");
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{zeros}],"data_offsets":[0,0]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    crate::checkpoint(&bytes);
    let (opened, memory) = crate::allocations::peak(|| {
        pcae_train::checkpoint::file::Reader::new(Path::new("zeros"), std::io::Cursor::new(&bytes))
    });
    opened.expect("a valid file");
    // The bound would be worth little if it were far above what there is.
    assert!(
        memory > 24 * bytes.len(),
        "{memory} bytes for {}",
        bytes.len()
    );
    println!(
        "{:.1} bytes of memory per byte of header",
        memory as f64 / bytes.len() as f64
    );
}

/// A target that only ever saw refused configurations would test half of what it says.
#[test]
fn seeds_reach_accepted_configurations() {
    let (mut teachers, mut pixels, mut classifiers) = (0, 0, 0);
    for seed in seeds("config") {
        let Ok((pretrain, classifier, _)) =
            crate::config::configs(&mut arbitrary::Unstructured::new(&seed))
        else {
            continue;
        };
        if pretrain.check().is_ok() {
            match pretrain.target {
                Target::Teacher(reduction) => {
                    teachers += reduction.stages(pretrain.vit.depth).min(1)
                }
                Target::Pixels { .. } => pixels += 1,
            }
        }
        classifiers += usize::from(classifier.check().is_ok());
    }
    assert!(
        teachers > 0 && pixels > 0 && classifiers > 0,
        "{teachers} {pixels} {classifiers}"
    );
}
