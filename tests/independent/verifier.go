// A verifier of the log that shares no line with it: golang.org/x/mod/sumdb (tlog, note), behind Go's checksum database.
//
//	verifier URL VKEY API_KEY OLD_SIZE
//
// Opens the checkpoint, reads every tile and bundle, holds each entry against its leaf and each leaf against the root,
// and checks the proofs that the service itself gives. Ends with status 1 at the first that does not hold.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const height = 8

var url, apiKey string

func fail(format string, arguments ...any) {
	fmt.Printf(format+"\n", arguments...)
	os.Exit(1)
}

func must[T any](value T, err error) T {
	if err != nil {
		fail("%v", err)
	}
	return value
}

func get(path string) ([]byte, error) {
	request := must(http.NewRequest("GET", url+path, nil))
	request.Header.Set("X-API-Key", apiKey)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != 200 {
		return nil, fmt.Errorf("%s: %s", path, response.Status)
	}
	return io.ReadAll(response.Body)
}

// A checkpoint is a note whose text is origin, size and root (c2sp.org/tlog-checkpoint).
func openCheckpoint(text []byte, vkey string) tlog.Tree {
	verifier := must(note.NewVerifier(vkey))
	opened := must(note.Open(text, note.VerifierList(verifier)))
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		fail("not a checkpoint of %s", verifier.Name())
	}
	return tlog.Tree{N: must(strconv.ParseInt(lines[1], 10, 64)), Hash: must(tlog.ParseHash(lines[2]))}
}

// The paths of c2sp.org/tlog-tiles are those of the checksum database without the height.
func tilePath(tile tlog.Tile) string {
	return "/ledger/" + strings.Replace(tile.Path(), fmt.Sprintf("tile/%d/", height), "tile/", 1)
}

type reader struct{}

func (reader) Height() int                     { return height }
func (reader) SaveTiles([]tlog.Tile, [][]byte) {}
func (reader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(tiles))
	for i, tile := range tiles {
		read, err := get(tilePath(tile))
		if err != nil {
			return nil, err
		}
		data[i] = read
	}
	return data, nil
}

func readEntries(tree tlog.Tree) [][]byte {
	var entries [][]byte
	for start := int64(0); start < tree.N; start += 1 << height {
		width := int(min(tree.N-start, 1<<height))
		path := tilePath(tlog.Tile{H: height, L: 0, N: start >> height, W: width})
		bundle := must(get(strings.Replace(path, "tile/0/", "tile/entries/", 1)))
		for len(bundle) > 0 {
			size := int(binary.BigEndian.Uint16(bundle))
			entries = append(entries, bundle[2:2+size])
			bundle = bundle[2+size:]
		}
	}
	return entries
}

func min(a, b int64) int64 {
	if a < b {
		return a
	}
	return b
}

func decode(path []string) []tlog.Hash {
	hashes := make([]tlog.Hash, len(path))
	for i, text := range path {
		copy(hashes[i][:], must(base64.StdEncoding.DecodeString(text)))
	}
	return hashes
}

func checkServedProof(eventID int64, vkey string) {
	var proof struct {
		LeafIndex     int64    `json:"leaf_index"`
		Entry         string   `json:"entry"`
		InclusionPath []string `json:"inclusion_path"`
		Checkpoint    string   `json:"checkpoint"`
	}
	if err := json.Unmarshal(must(get(fmt.Sprintf("/events/%d/proof", eventID))), &proof); err != nil {
		fail("%v", err)
	}
	tree := openCheckpoint([]byte(proof.Checkpoint), vkey)
	leaf := tlog.RecordHash([]byte(proof.Entry))
	path := tlog.RecordProof(decode(proof.InclusionPath))
	if err := tlog.CheckRecord(path, tree.N, tree.Hash, proof.LeafIndex, leaf); err != nil {
		fail("event %d: %v", eventID, err)
	}
}

func checkServedConsistency(oldSize int64, oldRoot tlog.Hash, tree tlog.Tree) {
	var proof struct {
		Path []string `json:"consistency_path"`
	}
	text := must(get(fmt.Sprintf("/ledger/consistency?from=%d&to=%d", oldSize, tree.N)))
	if err := json.Unmarshal(text, &proof); err != nil {
		fail("%v", err)
	}
	if err := tlog.CheckTree(tlog.TreeProof(decode(proof.Path)), tree.N, tree.Hash, oldSize, oldRoot); err != nil {
		fail("consistency from %d: %v", oldSize, err)
	}
}

func main() {
	url, apiKey = os.Args[1], os.Args[3]
	vkey, oldSize := os.Args[2], must(strconv.ParseInt(os.Args[4], 10, 64))
	tree := openCheckpoint(must(get("/ledger/checkpoint")), vkey)
	entries := readEntries(tree)
	if int64(len(entries)) != tree.N {
		fail("%d entries in a tree of %d", len(entries), tree.N)
	}
	// TileHashReader holds every tile against the root before it hands out a hash of it.
	hashes := tlog.TileHashReader(tree, reader{})
	indexes := make([]int64, tree.N)
	for i := range indexes {
		indexes[i] = tlog.StoredHashIndex(0, int64(i))
	}
	leaves := must(hashes.ReadHashes(indexes))
	for i, entry := range entries {
		if tlog.RecordHash(entry) != leaves[i] {
			fail("the entry of leaf %d is not that of its tile", i)
		}
	}
	for i := int64(0); i < tree.N; i += tree.N/20 + 1 {
		checkServedProof(i+1, vkey)
	}
	checkServedConsistency(oldSize, must(tlog.TreeHash(oldSize, hashes)), tree)
	fmt.Printf("OK: %d entries\n", tree.N)
}
