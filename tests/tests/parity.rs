//! Every golden fixture on every backend and instruction set there is.

use pcae_kernel::reference::Reference;
use pcae_tests::fixtures;
use pcae_train::parity::replay;

#[test]
fn reference_f64() {
    for path in fixtures() {
        let report = replay(&mut Reference::<f64, _>::owned(), &path).unwrap();
        assert!(report.passes(), "{}\n{report}", path.display());
        // The fixtures are rounded to f32: half a unit in the last place, and sums of such in the losses.
        let worst = report.worst().unwrap();
        assert!(worst.relative < 1e-6, "{}: {worst:?}", path.display());
    }
}

#[test]
fn reference_f32() {
    for path in fixtures() {
        let report = replay(&mut Reference::<f32, _>::owned(), &path).unwrap();
        assert!(report.passes(), "{}\n{report}", path.display());
    }
}
