from pipestill.entry import main

raise SystemExit(main())
